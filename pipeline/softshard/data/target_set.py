"""The stored targets of one split, by row number, and the order of an epoch.

In: a target set and how its targets are mixed with the labels. Out: the order of an epoch, and the rows of any of its
batches. Parts are streamed: memory holds the bytes of one part, the rows that the shuffle buffer waits for, and some
dozens of bytes per sequence of the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.data.filters import GroupWeights, RowFilter
from softshard.data.mixing import MixedRow, Mixing, mixed_rows, scale_weights
from softshard.data.row_index import RowIndex, index_rows
from softshard.data.shuffle import batch_bounds, through_buffer
from softshard.errors import CorpusEmpty, FilterMatchesNothing
from softshard.records.seeds import keyed_generator
from softshard.shard.manifest import Manifest
from softshard.shard.read import PartReader, read_part
from softshard.shard.schema import PartMetadata
from softshard.storage import Store

__all__ = ["EpochOrder", "RowGroupRows", "SetReader", "TargetSet", "order_epoch", "reorder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSet:
    """One split of the targets of a run."""

    store: Store
    """Folder `targets/` of the run."""
    manifest: Manifest
    split: str = "train"
    where: RowFilter = field(default_factory=RowFilter)
    """Sequences to train on."""
    groups: GroupWeights | None = None
    """Factors for the weights of their labels in the loss; None: all are 1."""


class RowGroupRows(NamedTuple):
    """Some rows of one row group of a part."""

    part: int
    group: int
    rows: NDArray[np.int64]
    """Row numbers, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The order of one epoch."""

    row_groups: list[tuple[int, int]]
    """(part, row group) in the order of reading."""
    rows: NDArray[np.int64]
    """[R] row numbers in the order of training."""
    bounds: NDArray[np.int64]
    """[num_batches + 1] indices into `rows`: batch i is rows[bounds[i]:bounds[i + 1]]."""
    tokens: NDArray[np.int64]
    """[num_batches] tokens of each batch, without padding."""

    @property
    def num_batches(self) -> int:
        """Batches of all ranks together."""
        return len(self.bounds) - 1

    def rows_in(self, batches: Sequence[int]) -> list[int]:
        """Row numbers of some batches, in order."""
        return [row for batch in batches for row in self.rows[self.bounds[batch] : self.bounds[batch + 1]].tolist()]


def order_epoch(
    index: RowIndex, *, key: Sequence[str | int], batch_tokens: int, shuffle_buffer: int, packing: bool
) -> EpochOrder:
    """Permute parts, then their row groups, then rows within a bounded buffer; form batches in that one order."""
    parts, groups = (keyed_generator("softshard.order", *key, what) for what in ("parts", "groups"))
    row_groups = [
        (part, group)
        for part in parts.permutation(len(index.groups)).tolist()
        for group in groups.permutation(len(index.groups[part])).tolist()
    ]
    rows = np.concatenate([np.arange(*index.groups[part][group]) for part, group in row_groups])
    rows = rows[index.passing[rows]]
    rows = through_buffer(rows, size=shuffle_buffer, generator=keyed_generator("softshard.order", *key, "rows"))
    lengths = index.lengths[rows]
    bounds = batch_bounds(lengths, batch_tokens=batch_tokens, packing=packing)
    tokens = np.add.reduceat(lengths, bounds[:-1]) if len(lengths) else np.zeros(0, dtype=np.int64)
    return EpochOrder(row_groups=row_groups, rows=rows, bounds=bounds, tokens=tokens)


class SetReader:
    """Rows of one target set, mixed with their labels.

    Raises:
        CorpusEmpty: the split has no sequence.
        FilterMatchesNothing: no row passes the filter; raised when the rows are first needed.
        PartCorrupt: while reading: a part is missing, differs from its receipt, or has other sketch settings than the
            other parts.
    """

    def __init__(self, targets: TargetSet, mixing: Mixing, *, with_names: bool = False) -> None:
        self._targets, self._mixing, self._with_names = targets, mixing, with_names
        self._receipts = targets.manifest.of_split(targets.split)
        if not any(receipt.num_sequences for receipt in self._receipts):
            raise CorpusEmpty(counts={"sequences": 0}, split=targets.split)

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return self._targets.manifest.digest

    @cached_property
    def index(self) -> RowIndex:
        """Of the split's rows; read once."""
        targets = self._targets
        index = index_rows(
            targets.store, self._receipts, where=targets.where, groups=targets.groups, with_names=self._with_names
        )
        if not index.passing.any():
            raise FilterMatchesNothing(uri=targets.store.uri, split=targets.split, where=str(targets.where))
        return index

    @property
    def metadata(self) -> PartMetadata:
        """Of the first part."""
        return self.index.metadata

    def rows(self, epoch: EpochOrder, batches: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        """Rows of some batches, in order. Only row groups with such rows are decoded, and only their parts are read."""
        wanted = epoch.rows_in(batches)
        found = reorder(self.read_row_groups(self.row_groups_with(wanted, epoch), draw=draw), wanted)
        return scale_weights(found, wanted, factors=self.index.factors)

    def row_groups_with(self, rows: Sequence[int], epoch: EpochOrder) -> Iterator[RowGroupRows]:
        """The row groups that hold some rows, in an epoch's order of reading."""
        wanted = np.zeros(len(self.index.lengths), dtype=np.bool_)
        wanted[rows] = True
        for part, group in epoch.row_groups:
            first, last = self.index.groups[part][group]
            if wanted[first:last].any():
                yield RowGroupRows(part, group, first + np.flatnonzero(wanted[first:last]))

    def read_row_groups(self, row_groups: Iterable[RowGroupRows], *, draw: int) -> Iterator[dict[int, MixedRow]]:
        """Rows by number, a block of a row group at a time; one part is held in memory at a time."""
        current, reader = -1, None
        for part, group, numbers in row_groups:
            if part != current or reader is None:
                reader = None
                current, reader = part, self._open(part)
            first = self.index.groups[part][group][0]
            for block in reader.blocks(group, draw=draw, with_scores=self._mixing.with_scores):
                inside = numbers[(first <= numbers) & (numbers < first + len(block.lengths))]
                if len(inside):
                    places = (inside - first).tolist()
                    rows = mixed_rows(block, places, metadata=reader.metadata, mixing=self._mixing)
                    yield {first + place: row for place, row in rows}
                first += len(block.lengths)

    def _open(self, part: int) -> PartReader:
        """A part, whose bytes are checked against the receipt each time they are read; none are kept."""
        receipt, store = self._receipts[part], self._targets.store
        return PartReader(read_part(store, receipt), uri=f"{store.uri}/{receipt.path}")


def reorder(read: Iterator[dict[int, MixedRow]], numbers: Sequence[int]) -> Iterator[MixedRow]:
    """Rows in the order of `numbers`, from rows read in another order; rows that are read too early are held."""
    held: dict[int, MixedRow] = {}
    for number in numbers:
        while number not in held:
            held.update(next(read))
        yield held.pop(number)
