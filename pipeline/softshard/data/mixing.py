"""Decoded rows to the rows of a batch: the label's own token is mixed in, and label weights are computed.

In: blocks of a part. Out: rows with arrays of their own, so that no row keeps its neighbours in memory. Another alpha
needs nothing recomputed: P_hat = alpha * delta(label) + (1 - alpha) * sketch, and alpha = 1 is cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.config import SketchSettings
from softshard.shard.decode import Block
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.entries import Entries, entries_of
from softshard.sketch.types import TokenSequence

__all__ = ["LabelWeights", "MixedRow", "Mixing", "mixed_rows", "scale_weights", "text_row"]


class MixedRow(NamedTuple):
    """One sequence of L tokens, P labels and E entries."""

    positions: NDArray[np.int64]
    """[P] indices in token_ids of the positions before the labels."""
    token_ids: NDArray[np.int32]
    """[L]"""
    counts: NDArray[np.int64]
    """[P] entries of each label; with alpha above 0 the first is the label's own token."""
    entry_ids: NDArray[np.int32]
    """[E]"""
    entry_weights: NDArray[np.float32]
    """[E]"""
    tail_mass: NDArray[np.float32] | None
    """[P] mass of the ghost token; None without one."""
    position_weights: NDArray[np.float32] | None
    """[P]; None: all 1."""
    counted: NDArray[np.float32] | None = None
    """[P] `position_weights` without the factor of the sequence's group; None: there is no such factor."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[P] ids of the labels."""
        return self.token_ids[self.positions + 1]


_Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelWeights:
    """The weight of a label in the loss: the product of two functions of values that its part stores.

    Each function is given as points (value, weight) by ascending value, with straight lines between them and constant
    before the first and after the last; without points it is 1. `((-9, 0.0), (-6, 1.0))` for the label's
    log-probability fades out tokens that the teacher finds nearly impossible, such as misprints.
    """

    entropy: _Points = ()
    """Of the target's entropy, in nats."""
    label_logprob: _Points = ()
    """Of the label's log-probability, in nats."""

    def __post_init__(self) -> None:
        for name, points in asdict(self).items():
            values = [value for value, _ in points]
            if values != sorted(set(values)) or not all(0 <= weight < np.inf for _, weight in points):
                raise ValueError(f"{name} is {points}: values must rise, and weights must not be negative")

    @property
    def are_given(self) -> bool:
        """Whether any label can have another weight than 1."""
        return bool(self.entropy or self.label_logprob)

    def __call__(
        self, *, entropy: NDArray[np.float32], label_logprob: NDArray[np.float32]
    ) -> NDArray[np.float32] | None:
        """[P] weights of P labels; None where all are 1."""
        given = [(self.entropy, entropy), (self.label_logprob, label_logprob)]
        weights = [np.interp(at, *np.array(points).T) for points, at in given if points]
        return np.prod(weights, axis=0).astype(np.float32) if weights else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How a stored target is turned into the target of a batch: alpha * delta(label) + (1 - alpha) * sketch."""

    alpha: float
    """Weight of the label's own token."""
    truncated: Literal["ghost", "renormalise"]
    """For kinds that leave tokens out (`topk`, `nucleus`): `ghost` keeps the weights and gives (1 - alpha) of the
    stored tail mass to a ghost token; `renormalise` scales the weights of a label to 1 before mixing. A `threshold`
    sketch is never scaled: its sum is random, and scaling would bias it."""
    temperature: float = 1.0
    """As in `entries_of`."""
    weights: LabelWeights = field(default_factory=LabelWeights)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, it must be from 0 to 1: a share of the target")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature is {self.temperature}, it must be above 0")
        if self.truncated not in ("ghost", "renormalise"):
            raise ValueError(f"truncated is {self.truncated!r}, it must be 'ghost' or 'renormalise'")

    def problem_with(self, sketch: SketchSettings) -> str | None:
        """Why targets that are stored as `sketch` cannot be loaded with these settings; None where they can."""
        renormalised = self.truncated == "renormalise"
        if self.temperature == 1 or self.alpha == 1 or sketch.takes_temperature(renormalised=renormalised):
            return None
        return f"a temperature of {self.temperature:g} cannot be applied at load to targets of kind {sketch.kind}"

    @property
    def with_scores(self) -> bool:
        """Whether label weights depend on the stored entropies and log-probabilities."""
        return self.weights.are_given

    def digest_parts(self) -> list[Any]:
        """The settings as plain values, for a digest."""
        return list(asdict(self).values())


def mixed_rows(
    block: Block, wanted: Iterable[int], *, metadata: PartMetadata, mixing: Mixing
) -> Iterator[tuple[int, MixedRow]]:
    """Some rows of a block, with their indices in it and arrays of their own."""
    entries, tail = _entries(block, metadata, mixing)
    targets = block.targets
    weights = mixing.weights(entropy=targets.entropy, label_logprob=targets.label_logprob)
    counts = np.diff(entries.offsets)
    tokens, labels = counts_to_offsets(block.lengths), counts_to_offsets(block.label_counts)
    bounds = tokens.tolist(), labels.tolist(), entries.offsets[labels].tolist()
    for row in wanted:
        t, p, e = (slice(bound[row], bound[row + 1]) for bound in bounds)
        yield (
            row,
            MixedRow(
                block.label_indices[p] - (tokens[row] + 1),
                block.token_ids[t].copy(),
                counts[p].copy(),
                entries.ids[e].copy(),
                entries.weights[e].copy(),
                None if tail is None else tail[p].copy(),
                None if weights is None else weights[p].copy(),
            ),
        )


def _entries(block: Block, metadata: PartMetadata, mixing: Mixing) -> tuple[Entries, NDArray[np.float32] | None]:
    """Entries of a block's labels, and the mass of the ghost token where there is one."""
    targets, alpha = block.targets, mixing.alpha
    if alpha == 1:
        return _own_tokens(block.labels), None
    tail = None
    if metadata.sketch_class.leaves_ghost:
        if mixing.truncated == "ghost":
            tail = ((1 - alpha) * targets.tail_mass).astype(np.float32)
        else:
            targets = replace(targets, tail_mass=np.zeros_like(targets.tail_mass))
    labels = block.labels if alpha > 0 else None
    entries = entries_of(targets, tau=metadata.tau, temperature=mixing.temperature, labels=labels, alpha=alpha)
    return entries, tail


def _own_tokens(labels: NDArray[np.int32]) -> Entries:
    """Each label's own token alone."""
    offsets = np.arange(len(labels) + 1, dtype=np.int64)
    return Entries(ids=labels, weights=np.ones(len(labels), dtype=np.float32), offsets=offsets)


def scale_weights(
    rows: Iterator[MixedRow], numbers: Sequence[int], *, factors: NDArray[np.float32] | None
) -> Iterator[MixedRow]:
    """Rows whose label weights are multiplied by factors[number]; unchanged if `factors` is None."""
    if factors is None:
        yield from rows
        return
    for number, row in zip(numbers, rows, strict=True):
        own = np.ones(len(row.counts), dtype=np.float32) if row.position_weights is None else row.position_weights
        yield row._replace(position_weights=own * factors[number], counted=own)


def text_row(sequence: TokenSequence) -> MixedRow:
    """A sequence with its own tokens as targets (alpha = 1): the loss is cross-entropy."""
    own = _own_tokens(sequence.labels)
    return MixedRow(sequence.positions, sequence.token_ids, np.diff(own.offsets), own.ids, own.weights, None, None)
