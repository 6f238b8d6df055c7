"""Committed parts to batches, in an order that any number of ranks share.

In: a manifest and the store that its parts lie in. Out: one epoch of batches after another. The order of an epoch is
a function of (manifest, seed, epoch) and the sizes of batch and buffer: parts are permuted, then their row groups, then
rows within a bounded buffer; batches are formed in that one order, and then dealt to ranks. Parts are streamed: in
memory are the bytes of one part, the rows of the buffer, and some dozens of bytes for each sequence of the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from softshard.config import digest_of
from softshard.errors import CorpusEmpty, ResumeMismatch
from softshard.shard.manifest import Manifest
from softshard.shard.read import Row, read_checked, read_row_group
from softshard.storage import Store
from softshard.target.types import TokenSequence
from softshard.train.batch import Batch, collate, collate_text
from softshard.train.order import batch_bounds, generator_of, through_buffer
from softshard.train.rows import RowIndex, index_rows

__all__ = ["BatchSource", "SoftLabelStream", "TextBatches"]

StreamState = dict[str, Any]


class BatchSource(Protocol):
    """Batches without end, an epoch after the other, that can be left and taken up again."""

    @property
    def digest(self) -> str:
        """Names what the batches hold, whatever their order."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that the iterator gives in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on, over all epochs to come."""

    def state_dict(self) -> StreamState:
        """State after the last batch that was given: plain values."""

    def load_state_dict(self, state: StreamState) -> None:
        """Take up a state; iterators that run already do not see it. Raises ResumeMismatch for that of other data."""


class _Source:
    """What both sources share: their state, and whose it is."""

    def __init__(self, *, data: str, content: str, seed: int, batch_tokens: int, shuffle_buffer: int) -> None:
        self._data, self._content, self._seed = data, content, seed
        self._batch_tokens, self._shuffle_buffer = batch_tokens, shuffle_buffer
        self._epoch = self._consumed = 0

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the data and of what is made of it: all that batches hold, whatever their order."""
        return self._content

    def state_dict(self) -> StreamState:
        """The data's digest, what its order hangs on, the epoch, and how many of its batches all ranks together had."""
        return {**self._order(), "epoch": self._epoch, "consumed": self._consumed}

    def load_state_dict(self, state: StreamState) -> None:
        """Take up a state, saved with any number of ranks; iterators that run already do not see it.

        Raises:
            ResumeMismatch: it belongs to other data, or to another order of the same.
        """
        for what, current in self._order().items():
            if state[what] != current:
                raise ResumeMismatch(saved=str(state[what]), current=str(current), what=what)
        self._epoch, self._consumed = state["epoch"], state["consumed"]

    def _order(self) -> StreamState:
        return {
            "manifest": self._data,
            "seed": self._seed,
            "batch_tokens": self._batch_tokens,
            "shuffle_buffer": self._shuffle_buffer,
        }

    def _generator(self, epoch: int, what: str) -> np.random.Generator:
        return generator_of("softshard.order", self._data, self._seed, epoch, what)


class SoftLabelStream(_Source):
    """Batches of one split of a manifest's parts, with their stored targets.

    All ranks get the same number of batches: batch i of a round goes to rank i, and in the last round a rank without
    one gets a copy of the epoch's last batch with weight zero. Each epoch takes the next draw of the tails; `alpha`,
    `truncated` and `temperature` are as in `collate`.

    Raises:
        CorpusEmpty: the split has no sequence.
        PartCorrupt: while reading, of a part that is missing, is not what its receipt names, or has other sketch
            settings than the rest.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        split: str = "train",
        seed: int,
        batch_tokens: int,
        shuffle_buffer: int,
        alpha: float,
        truncated: Literal["ghost", "renormalise"],
        temperature: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, it must be from 0 to below world_size {world_size}")
        super().__init__(
            data=manifest.digest,
            content=digest_of([manifest.digest, split, alpha, truncated, temperature]),
            seed=seed,
            batch_tokens=batch_tokens,
            shuffle_buffer=shuffle_buffer,
        )
        self._store, self._receipts, self._split = store, manifest.of_split(split), split
        if not any(receipt.num_sequences for receipt in self._receipts):
            raise CorpusEmpty(counts={"sequences": 0}, split=split)
        self._alpha, self._truncated, self._temperature = alpha, truncated, temperature
        self._rank, self._world_size = rank, world_size
        self._plans: dict[int, _Plan] = {}

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that each rank gets in an epoch, those of weight zero counted."""
        return -(-self._plan(epoch).num_batches // self._world_size)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches from the current state on, over all epochs to come."""
        while True:
            plan = self._plan(self._epoch)
            first = self._consumed + self._rank
            rounds = range(self._consumed, plan.num_batches, self._world_size)
            mine = [min(first + number * self._world_size, plan.num_batches - 1) for number in range(len(rounds))]
            rows = self._rows(plan, mine)
            for start, index in zip(rounds, mine, strict=True):
                taken = [next(rows) for _ in range(plan.bounds[index], plan.bounds[index + 1])]
                batch = collate(
                    taken,
                    metadata=self._index.metadata,
                    alpha=self._alpha,
                    truncated=self._truncated,
                    draw=self._epoch,
                    temperature=self._temperature,
                )
                self._consumed = min(start + self._world_size, plan.num_batches)
                yield batch if index == start + self._rank else batch.without_weight()
            self._epoch, self._consumed = self._epoch + 1, 0

    @cached_property
    def _index(self) -> RowIndex:
        return index_rows(self._store, self._receipts)

    def _order(self) -> StreamState:
        return {**super()._order(), "split": self._split}

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            self._plans = {epoch: self._new_plan(epoch)}
        return self._plans[epoch]

    def _new_plan(self, epoch: int) -> _Plan:
        parts, groups = self._generator(epoch, "parts"), self._generator(epoch, "groups")
        arrivals = [
            (part, group)
            for part in parts.permutation(len(self._receipts)).tolist()
            for group in groups.permutation(len(self._index.groups[part])).tolist()
        ]
        rows = np.concatenate([np.arange(*self._index.groups[part][group]) for part, group in arrivals])
        order = through_buffer(rows, size=self._shuffle_buffer, generator=self._generator(epoch, "rows"))
        bounds = batch_bounds(self._index.lengths[order], batch_tokens=self._batch_tokens)
        return _Plan(arrivals=arrivals, order=order, bounds=bounds)

    def _rows(self, plan: _Plan, batches: Sequence[int]) -> Iterator[Row]:
        """Rows of some batches, in order; row groups that hold none of them are not decoded, nor parts read."""
        order = [row for index in batches for row in plan.order[plan.bounds[index] : plan.bounds[index + 1]].tolist()]
        wanted = np.zeros(len(plan.order), dtype=np.bool_)
        wanted[order] = True
        groups = self._groups(plan, wanted)
        held: dict[int, Row] = {}
        for number in order:
            while number not in held:
                held.update(next(groups))
            yield held.pop(number)

    def _groups(self, plan: _Plan, wanted: NDArray[np.bool_]) -> Iterator[dict[int, Row]]:
        """The wanted rows of each row group, by number, as the groups arrive."""
        current, content = -1, b""
        for part, group in plan.arrivals:
            first, last = self._index.groups[part][group]
            if not wanted[first:last].any():
                continue
            receipt = self._receipts[part]
            if part != current:
                content = b""
                current, content = part, read_checked(self._store, receipt)
            rows, _ = read_row_group(content, group, uri=f"{self._store.uri}/{receipt.path}")
            yield {first + index: _owned(row) for index, row in enumerate(rows) if wanted[first + index]}


class TextBatches(_Source):
    """Batches of sequences in memory with their own tokens as targets: cross-entropy. `name` says what they are for."""

    def __init__(self, sequences: Sequence[TokenSequence], *, seed: int, batch_tokens: int, name: str) -> None:
        if not sequences:
            raise CorpusEmpty(counts={"sequences": 0}, split=name)
        data = digest_of(["text", name, [sequence.sequence_id for sequence in sequences]])
        super().__init__(data=data, content=data, seed=seed, batch_tokens=batch_tokens, shuffle_buffer=len(sequences))
        self._sequences = sequences
        self._lengths = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._plan(epoch)[1]) - 1

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on, over all epochs to come."""
        while True:
            order, bounds = self._plan(self._epoch)
            for index in range(self._consumed, len(bounds) - 1):
                batch = collate_text([self._sequences[row] for row in order[bounds[index] : bounds[index + 1]]])
                self._consumed = index + 1
                yield batch
            self._epoch, self._consumed = self._epoch + 1, 0

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = self._generator(epoch, "rows").permutation(len(self._sequences))
        return order, batch_bounds(self._lengths[order], batch_tokens=self._batch_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The order of one epoch."""

    arrivals: list[tuple[int, int]]
    """(part, row group) in the order of reading."""
    order: NDArray[np.int64]
    """[R] numbers of rows in the order of training."""
    bounds: NDArray[np.int64]
    """[num_batches + 1] places in `order`."""

    @property
    def num_batches(self) -> int:
        return len(self.bounds) - 1


def _owned(row: Row) -> Row:
    """The row with arrays of its own: as views, each would keep its whole row group in memory."""
    sequence, targets = row
    arrays = {field.name: getattr(targets, field.name).copy() for field in fields(targets)}
    return replace(sequence, token_ids=sequence.token_ids.copy()), replace(targets, **arrays)
