"""The stored targets of one split, by row number, and the order of an epoch.

In: a target set and how its targets are to be mixed. Out: the plan of an epoch, and the rows of any of its batches.
Parts are streamed: in memory are the bytes of one part, the wanted rows of the shuffle buffer, and some dozens of bytes
for each sequence of the split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from softshard.data.filters import GroupWeights, RowFilter
from softshard.data.mixing import MixedRow, Mixing, mixed_rows, weighed
from softshard.data.row_index import RowIndex, index_rows
from softshard.data.shuffle import batch_bounds, through_buffer
from softshard.errors import CorpusEmpty, FilterMatchesNothing
from softshard.records.seeds import keyed_generator
from softshard.shard.manifest import Manifest
from softshard.shard.read import PartReader, read_part
from softshard.shard.schema import PartMetadata
from softshard.storage import Store

__all__ = ["Arrival", "EpochOrder", "SetReader", "TargetSet", "in_order", "order_epoch"]

Arrival = tuple[int, int, NDArray[np.int64]]
"""Part, row group, numbers of the wanted rows in it, rising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSet:
    """One split of the targets of a run."""

    store: Store
    """Folder `targets/` of the run."""
    manifest: Manifest
    split: str = "train"
    where: RowFilter = field(default_factory=RowFilter)
    """Sequences that take part."""
    groups: GroupWeights | None = None
    """Factors of their weights in the loss; None: all are 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """The order of one epoch."""

    arrivals: list[tuple[int, int]]
    """(part, row group) in the order of reading."""
    order: NDArray[np.int64]
    """[R] numbers of rows in the order of training."""
    bounds: NDArray[np.int64]
    """[num_batches + 1] places in `order`."""
    tokens: NDArray[np.int64]
    """[num_batches] tokens of each batch, without padding."""

    @property
    def num_batches(self) -> int:
        """Batches of all ranks together."""
        return len(self.bounds) - 1

    def rows_of(self, batches: Sequence[int]) -> list[int]:
        """Numbers of the rows of some batches, in order."""
        return [row for batch in batches for row in self.order[self.bounds[batch] : self.bounds[batch + 1]].tolist()]


def order_epoch(
    index: RowIndex, *, key: Sequence[str | int], batch_tokens: int, shuffle_buffer: int, packing: bool
) -> EpochOrder:
    """Parts permuted, then their row groups, then rows within a bounded buffer; batches formed in that one order."""
    parts, groups = (keyed_generator("softshard.order", *key, what) for what in ("parts", "groups"))
    arrivals = [
        (part, group)
        for part in parts.permutation(len(index.groups)).tolist()
        for group in groups.permutation(len(index.groups[part])).tolist()
    ]
    rows = np.concatenate([np.arange(*index.groups[part][group]) for part, group in arrivals])
    rows = rows[index.passing[rows]]
    order = through_buffer(rows, size=shuffle_buffer, generator=keyed_generator("softshard.order", *key, "rows"))
    lengths = index.lengths[order]
    bounds = batch_bounds(lengths, batch_tokens=batch_tokens, packing=packing)
    tokens = np.add.reduceat(lengths, bounds[:-1]) if len(lengths) else np.zeros(0, dtype=np.int64)
    return EpochOrder(arrivals=arrivals, order=order, bounds=bounds, tokens=tokens)


class SetReader:
    """Rows of one target set, mixed as asked.

    Raises:
        CorpusEmpty: the split has no sequence.
        FilterMatchesNothing: when its rows are first looked at: none of them passes the filter.
        PartCorrupt: while reading, of a part that is missing, is not what its receipt names, or has other sketch
            settings than the rest.
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

    def rows(self, plan: EpochOrder, batches: Sequence[int], *, draw: int) -> Iterator[MixedRow]:
        """Rows of some batches, in order; row groups that hold none of them are not decoded, nor parts read."""
        order = plan.rows_of(batches)
        return weighed(
            in_order(order, self.arriving(self.arrivals(plan, order), draw=draw)), order, factors=self.index.factors
        )

    def arrivals(self, plan: EpochOrder, order: Sequence[int]) -> Iterator[Arrival]:
        """The row groups that hold some rows, as they come in an epoch."""
        wanted = np.zeros(len(self.index.lengths), dtype=np.bool_)
        wanted[order] = True
        for part, group in plan.arrivals:
            first, last = self.index.groups[part][group]
            if wanted[first:last].any():
                yield part, group, first + np.flatnonzero(wanted[first:last])

    def arriving(self, arrivals: Iterable[Arrival], *, draw: int) -> Iterator[dict[int, MixedRow]]:
        """Rows by number, some at a time, as their row groups arrive; one part is held at a time."""
        current, reader = -1, None
        for part, group, numbers in arrivals:
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
        """A part, whose bytes are checked against the receipt each time they are read: none are kept."""
        receipt, store = self._receipts[part], self._targets.store
        return PartReader(read_part(store, receipt), uri=f"{store.uri}/{receipt.path}")


def in_order(order: Sequence[int], arriving: Iterator[dict[int, MixedRow]]) -> Iterator[MixedRow]:
    """Rows in an order, from rows that arrive in another; what came too early is held."""
    held: dict[int, MixedRow] = {}
    for number in order:
        while number not in held:
            held.update(next(arriving))
        yield held.pop(number)
