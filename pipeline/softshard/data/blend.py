"""The same sequences under several style teachers, joined by sequence id and combined at load.

In: target sets of the same sequences and a weight for each. Out: rows whose entries are those of all sets, each weighed
with its set's share: the expectation is the weighted mean of the teachers' distributions. An id that several teachers
name stands there once for each of them, and adds up in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from softshard.data.filters import RowFilter
from softshard.data.mixing import MixedRow, Mixing, weighed
from softshard.data.row_index import RowIndex
from softshard.data.target_set import Arrival, EpochOrder, SetReader, TargetSet, in_order
from softshard.errors import BlendIncomplete, BlendInvalid
from softshard.records.digest import canonical_digest
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.entries import ranges_from

__all__ = ["Blend", "BlendReader", "combine_rows"]

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Target sets of the same sequences. The first one's filter and groups say which take part, and what they count."""

    sets: tuple[TargetSet, ...]
    weights: tuple[float, ...]
    """Above 0; each set's share is its weight over their sum."""

    def __post_init__(self) -> None:
        if len(self.sets) != len(self.weights) or not self.sets or not all(weight > 0 for weight in self.weights):
            raise ValueError(f"{len(self.sets)} sets with weights {self.weights}: there must be one above 0 for each")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each set; they sum to 1."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


class BlendReader:
    """Rows of a blend, with the interface of a `SetReader`.

    Raises:
        BlendInvalid: when rows are first looked at: the sets are of different tokenizers or temperatures, or some
            tokens are left to a ghost, of which there is one a teacher.
        BlendIncomplete: the same: they do not hold the same sequences.
    """

    def __init__(self, blend: Blend, mixing: Mixing) -> None:
        self._blend, self._mixing = blend, mixing
        # Each label's own token is mixed in once, after the sets are combined.
        own = mixing if mixing.alpha == 1 else replace(mixing, alpha=0.0)
        first, *others = blend.sets
        self._readers = [
            SetReader(first, own, with_names=True),
            *(SetReader(replace(other, where=RowFilter(), groups=None), own, with_names=True) for other in others),
        ]

    @property
    def digest(self) -> str:
        """Of the manifests and their shares."""
        return canonical_digest([[reader.digest for reader in self._readers], self._blend.shares])

    @property
    def metadata(self) -> PartMetadata:
        """Of the first set's first part."""
        return self._readers[0].metadata

    @property
    def index(self) -> RowIndex:
        """Of the first set's rows; all sets are known to hold them."""
        return self._joined[0]

    @cached_property
    def _joined(self) -> tuple[RowIndex, list[NDArray[np.int64]]]:
        """The first set's index, and for each other set the number that it gives to each of the first one's rows."""
        uris = [target_set.store.uri for target_set in self._blend.sets]
        if self._mixing.alpha < 1:
            self._check_temperatures()
        indices = [reader.index for reader in self._readers]
        for uri, index in zip(uris, indices, strict=True):
            _check_alike(uri, index.metadata, indices[0].metadata, self._mixing)
        names = [index.names for index in indices if index.names is not None]
        everyone = np.unique(np.concatenate(names))
        missing = {
            uri: np.setdiff1d(everyone, own) for uri, own in zip(uris, names, strict=True) if len(own) < len(everyone)
        }
        if missing:
            listed = {
                uri: (len(lacking), [name.decode()[:16] for name in lacking[:_NAMED].tolist()])
                for uri, lacking in missing.items()
            }
            raise BlendIncomplete(missing=listed, num_sequences=len(everyone))
        numbers = []
        for own in names[1:]:
            by_name = np.argsort(own)
            numbers.append(by_name[np.searchsorted(own, names[0], sorter=by_name)])
        return indices[0], numbers

    def _check_temperatures(self) -> None:
        first, *others = ((one.store.uri, one.manifest.sketch.temperature) for one in self._blend.sets)
        for uri, own in others:
            if own != first[1]:
                problem = f"has targets of temperature {own:g}, the first set of temperature {first[1]:g}"
                raise BlendInvalid(uri=uri, problem=f"{problem}; the mean of both is the target of neither")

    def rows(self, plan: EpochOrder, batches: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        """Rows of some batches, in order. Reading is cheapest where the sets are cut into the same parts."""
        order = plan.rows_of(batches)
        return weighed(self._combined(plan, order, draw=draw), order, factors=self.index.factors)

    def _combined(self, plan: EpochOrder, order: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        _, numbers = self._joined
        first, *others = self._readers
        streams = [in_order(order, first.arriving(first.arrivals(plan, order), draw=draw))]
        if self._mixing.alpha == 1 and not self._mixing.with_scores:
            yield from streams[0]
            return
        for reader, mapped in zip(others, numbers, strict=True):
            arrivals = _follow(first.arrivals(plan, order), mapped, reader.index)
            streams.append(in_order(mapped[order].tolist(), reader.arriving(arrivals, draw=draw)))
        for together in zip(*streams, strict=True):
            yield combine_rows(together, shares=self._blend.shares, alpha=self._mixing.alpha)


def _follow(arrivals: Iterator[Arrival], mapped: NDArray[np.int64], index: RowIndex) -> Iterator[Arrival]:
    """Row groups of another set in which the rows of the first one's row groups lie, as those arrive."""
    places = [(part, group) for part, groups in enumerate(index.groups) for group in range(len(groups))]
    stops = np.array([stop for groups in index.groups for _, stop in groups])
    for _, _, rows in arrivals:
        wanted = np.sort(mapped[rows])
        holders = np.searchsorted(stops, wanted, side="right")
        for holder in np.unique(holders).tolist():
            yield (*places[holder], wanted[holders == holder])


def combine_rows(rows: Sequence[MixedRow], *, shares: Sequence[float], alpha: float) -> MixedRow:
    """alpha * delta(label) + (1 - alpha) * the weighted mean of rows of one sequence, none of which has the label in.

    Weights of positions are the weighted mean of what the sets give. With alpha 1 the rows are their labels alone, and
    the first one's stand for all.
    """
    first = rows[0]
    given = [row.position_weights for row in rows if row.position_weights is not None]
    mean = np.average(given, axis=0, weights=shares).astype(np.float32) if given else None
    if alpha == 1:
        return first._replace(position_weights=mean)
    extra = 1 if alpha > 0 else 0
    counts = np.sum([row.counts for row in rows], axis=0) + extra
    offsets = counts_to_offsets(counts)
    ids = np.empty(offsets[-1], dtype=np.int32)
    weights = np.empty(offsets[-1], dtype=np.float32)
    starts = offsets[:-1]
    if extra:
        ids[starts], weights[starts] = first.token_ids[first.first_label :], alpha
        starts = starts + 1
    for row, share in zip(rows, shares, strict=True):
        places = ranges_from(starts, row.counts)
        ids[places], weights[places] = row.entry_ids, (1 - alpha) * share * row.entry_weights
        starts = starts + row.counts
    return first._replace(counts=counts, entry_ids=ids, entry_weights=weights, position_weights=mean)


def _check_alike(uri: str, metadata: PartMetadata, first: PartMetadata, mixing: Mixing) -> None:
    for name in ("tokenizer_fingerprint", "vocab_size"):
        if (own := getattr(metadata, name)) != (other := getattr(first, name)):
            problem = f"has {name.replace('_', ' ')} {own}, the first set has {other}; a blend needs one tokenizer"
            raise BlendInvalid(uri=uri, problem=problem)
    if metadata.sketch_class.leaves_ghost and mixing.truncated == "ghost" and mixing.alpha < 1:
        problem = (
            f"its {metadata.kind} targets leave tokens to a ghost, and those of several teachers are not one ghost"
        )
        raise BlendInvalid(uri=uri, problem=f"{problem}; set `truncated: renormalise`, or store threshold targets")
