"""The same sequences under several style teachers, joined by sequence id and combined when loaded.

In: target sets of the same sequences and a weight for each. Out: rows with the entries of all sets, each multiplied by
its set's share: their expectation is the weighted mean of the teachers' distributions. An id that several teachers have
occurs once for each of them, and its weights add up in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from softshard.data.filters import RowFilter
from softshard.data.mixing import MixedRow, Mixing, scale_weights
from softshard.data.row_index import RowIndex
from softshard.data.target_set import EpochOrder, RowGroupRows, SetReader, TargetSet, reorder
from softshard.errors import BlendIncomplete, BlendInvalid
from softshard.records.digest import canonical_digest
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.entries import ranges_from

__all__ = ["Blend", "BlendReader", "combine_rows"]

_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Target sets of the same sequences. The first set's filter selects them, and its groups give their weights."""

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
        BlendInvalid: when rows are first needed: the sets have different tokenizers or temperatures, or have ghost
            tokens, which differ from teacher to teacher.
        BlendIncomplete: when rows are first needed: the sets do not hold the same sequences.
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
        """Of the first set's rows, which all sets are known to hold."""
        return self._joined[0]

    @cached_property
    def _joined(self) -> tuple[RowIndex, list[NDArray[np.int64]]]:
        """The first set's index, and for each other set its numbers of the first set's rows."""
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
        first, *others = ((s.store.uri, s.manifest.sketch.temperature) for s in self._blend.sets)
        for uri, own in others:
            if own != first[1]:
                problem = f"has targets of temperature {own:g}, the first set of temperature {first[1]:g}"
                raise BlendInvalid(uri=uri, problem=f"{problem}; the mean of both is the target of neither")

    def rows(self, epoch: EpochOrder, batches: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        """Rows of some batches, in order. Reading is cheapest where the sets are cut into the same parts."""
        wanted = epoch.rows_in(batches)
        return scale_weights(self._combined(epoch, wanted, draw=draw), wanted, factors=self.index.factors)

    def _combined(self, epoch: EpochOrder, wanted: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        _, numbers = self._joined
        first, *others = self._readers
        streams = [reorder(first.read_row_groups(first.row_groups_with(wanted, epoch), draw=draw), wanted)]
        if self._mixing.alpha == 1 and not self._mixing.with_scores:
            yield from streams[0]
            return
        for reader, mapped in zip(others, numbers, strict=True):
            row_groups = _row_groups_of_other(first.row_groups_with(wanted, epoch), mapped, reader.index)
            streams.append(reorder(reader.read_row_groups(row_groups, draw=draw), mapped[wanted].tolist()))
        for together in zip(*streams, strict=True):
            yield combine_rows(together, shares=self._blend.shares, alpha=self._mixing.alpha)


def _row_groups_of_other(
    row_groups: Iterator[RowGroupRows], mapped: NDArray[np.int64], index: RowIndex
) -> Iterator[RowGroupRows]:
    """Row groups of another set that hold the rows of the first set's row groups, in the same order.

    Args:
        row_groups: of the first set.
        mapped: number in the other set of each row of the first.
        index: of the other set.
    """
    row_groups_of_index = [(part, group) for part, groups in enumerate(index.groups) for group in range(len(groups))]
    stops = np.array([stop for groups in index.groups for _, stop in groups])
    for _, _, rows in row_groups:
        wanted = np.sort(mapped[rows])
        holders = np.searchsorted(stops, wanted, side="right")
        for holder in np.unique(holders).tolist():
            part, group = row_groups_of_index[holder]
            yield RowGroupRows(part, group, wanted[holders == holder])


def combine_rows(rows: Sequence[MixedRow], *, shares: Sequence[float], alpha: float) -> MixedRow:
    """alpha * delta(label) + (1 - alpha) * the weighted mean of rows of one sequence, without the label mixed in yet.

    Weights of positions are the weighted mean of those of the sets. With alpha 1 every row holds its labels alone, so
    the entries of the first row are used.
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
        ids[starts], weights[starts] = first.labels, alpha
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
        problem = f"its {metadata.kind} targets have ghost tokens, which cannot be combined over several teachers"
        raise BlendInvalid(uri=uri, problem=f"{problem}; set `truncated: renormalise`, or store threshold targets")
