"""Several data sets as one: their batches in turn, by shares of tokens that may change from step to step.

In: data sets, each with its own order, and weights. Out: batches of all of them in one global order, which is a
function of their orders and the weights, and is sharded over ranks like that of one data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from softshard.data.batch import Batch
from softshard.data.dataset import SoftLabelDataset
from softshard.data.sharding import ShardedBatches
from softshard.errors import BlendInvalid
from softshard.records.digest import canonical_digest

__all__ = ["MixWeights", "SoftLabelMix", "Turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixWeights:
    """Weights of data sets over the batches of a training, counted over all ranks: straight lines between breakpoints.

    Before the first breakpoint and after the last one the weights are constant.
    """

    points: tuple[tuple[int, tuple[float, ...]], ...]
    """(number of a batch, a weight for each data set), by ascending number; weights are not negative, nor all 0."""

    def __post_init__(self) -> None:
        numbers = [number for number, _ in self.points]
        sizes = {len(weights) for _, weights in self.points}
        usable = all(min(weights, default=-1) >= 0 and sum(weights) > 0 for _, weights in self.points)
        if not numbers or numbers != sorted(set(numbers)) or len(sizes) != 1 or not usable:
            raise ValueError(f"{self.points}: numbers must rise, with a weight of at least 0 for each set, not all 0")

    @classmethod
    def constant(cls, *weights: float) -> MixWeights:
        """The same weights for all batches."""
        return cls(points=((0, weights),))

    @property
    def num_sets(self) -> int:
        """Data sets that the weights are for."""
        return len(self.points[0][1])

    def shares(self, number: int) -> list[float]:
        """Shares of the data sets at one batch, which sum to 1."""
        at = [point for point, _ in self.points]
        weights = [float(np.interp(number, at, values)) for values in zip(*(w for _, w in self.points), strict=True)]
        return [weight / sum(weights) for weight in weights]


class Turn(NamedTuple):
    """One batch in the global order."""

    source: int
    """Which data set it comes from."""
    epoch: int
    """Of that data set."""
    number: int
    """Of the batch in that epoch."""


class SoftLabelMix(ShardedBatches):
    """Batches of several data sets, interleaved so that each has had its share of the tokens at any time.

    An epoch has as many tokens as all sets together. A set with a small share is then not seen whole, and continues in
    the next epoch; a set with a large share starts over. Rank and world size are this data set's; those of the sets are
    ignored.

    Raises:
        BlendInvalid: when the data is first needed: the sets have different tokenizers or temperatures.
    """

    def __init__(
        self,
        sets: Sequence[SoftLabelDataset],
        weights: MixWeights,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int = 2,
    ) -> None:
        if weights.num_sets != len(sets):
            raise ValueError(f"weights for {weights.num_sets} sets, there are {len(sets)}")
        self.sets, self._weights = tuple(sets), weights
        """Those that batches come from, in the order of the weights."""
        shares = asdict(weights)["points"]
        order = {"sets": [data.order for data in sets], "weights": [[at, list(values)] for at, values in shares]}
        super().__init__(
            order=order,
            content=canonical_digest([[data.digest for data in sets], shares]),
            rank=rank,
            world_size=world_size,
            prefetch=prefetch,
        )
        self._turns: dict[int, list[Turn]] = {}
        self._starts: list[tuple[int, list[tuple[int, int]]]] = [(0, [(0, 0)] * len(sets))]

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch, of all ranks together."""
        return len(self.turns(epoch))

    def turns(self, epoch: int) -> list[Turn]:
        """The global order of an epoch. It depends on the orders of all epochs before it, which are computed first."""
        self._check_tokenizers()
        if epoch not in self._turns:
            del self._starts[epoch + 1 :]
            while len(self._starts) <= epoch + 1:
                self._turns = {len(self._starts) - 1: self._next_epoch()}
        return self._turns[epoch]

    def read(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """Some batches of an epoch, by ascending number."""
        turns = self.turns(epoch)
        mine = [turns[number] for number in numbers]
        streams = [self._read_set(source, [turn for turn in mine if turn.source == source]) for source in self._range]
        for turn in mine:
            yield next(streams[turn.source])

    def _read_set(self, source: int, turns: Sequence[Turn]) -> Iterator[Batch]:
        for epoch, group in groupby(turns, key=lambda turn: turn.epoch):
            yield from self.sets[source].read(epoch, [turn.number for turn in group])

    @property
    def _range(self) -> range:
        return range(len(self.sets))

    def _next_epoch(self) -> list[Turn]:
        """Turns of the first epoch that has none yet; also records where the epoch after it begins.

        The next turn belongs to the set whose tokens are furthest behind its share; among equals, to the first.
        """
        first_number, places = self._starts[-1]
        places, credit, turns = list(places), np.zeros(len(self.sets)), list[Turn]()
        left = sum(int(data.epoch_order(0).tokens.sum()) for data in self.sets)
        while left > 0:
            shares = np.array(self._weights.shares(first_number + len(turns)))
            source = int(np.argmax(np.where(shares > 0, credit + shares, -np.inf)))
            epoch, number = places[source]
            tokens = self.sets[source].epoch_order(epoch).tokens
            turns.append(Turn(source, epoch, number))
            credit += shares * tokens[number]
            credit[source] -= tokens[number]
            left -= int(tokens[number])
            places[source] = (epoch, number + 1) if number + 1 < len(tokens) else (epoch + 1, 0)
        self._starts.append((first_number + len(turns), places))
        return turns

    def _check_tokenizers(self) -> None:
        for first, other in pairwise(self.sets):
            for name in ("tokenizer_fingerprint", "vocab_size"):
                own, wanted = getattr(other.metadata, name), getattr(first.metadata, name)
                if own != wanted:
                    problem = f"its {name.replace('_', ' ')} is {own}, another set's is {wanted}"
                    raise BlendInvalid(uri=other.uri, problem=f"{problem}; a mix needs one tokenizer")
            if None not in (first.temperature, other.temperature) and first.temperature != other.temperature:
                problem = f"its targets have temperature {other.temperature:g}, another set's {first.temperature:g}"
                raise BlendInvalid(uri=other.uri, problem=f"{problem}; a mix needs one")
