"""Batches in one global order, sharded over ranks and over the workers of their loaders.

In: batches by their number in an epoch. Out: this rank's batches, for torch's DataLoader or a plain loop. All ranks get
the same number of batches, whatever the number of ranks and workers, and a state saved with one number of either can be
loaded with any other. These batches must not be sharded a second time: under accelerate's wrappers that is an error.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from softshard.data.batch import Batch
from softshard.data.prefetch import prefetched
from softshard.data.text import StreamState, check_state, stream_position
from softshard.errors import ResumeMismatch, ShardedTwice

__all__ = ["ShardedBatches"]

_WRAPPERS = {"IterableDatasetShard", "DataLoaderDispatcher", "prepare_data_loader"}


class ShardedBatches(IterableDataset[Batch]):
    """One epoch of this rank's batches after another: each `iter` gives the rest of the current epoch.

    Batch i of a round goes to rank i. In the last round, a rank for which no batch is left gets a copy of the epoch's
    last batch with weight zero. With a DataLoader (`batch_size=None`, any number of workers) batches come in the same
    order. The copies of this data set in the workers are then the ones that advance, so set the epoch with `set_epoch`
    and take the state from `state_after(batch)`; persistent workers read the new position when the next pass begins.
    torchdata's StatefulDataLoader keeps the states of its workers by itself.

    Where rank and world size are not given, they are looked up at the start of each epoch: a process group may be
    joined after this data set is made.

    Args:
        order: plain values that determine the order, by name; they are part of the state.
        content: digest of everything that batches hold.
        rank: of this process; None: torch.distributed's, or the environment's as set by torchrun, or 0.
        world_size: number of ranks; None as above, or 1.
        prefetch: batches that a thread makes ahead; 0: none.
    """

    def __init__(
        self, *, order: StreamState, content: str, rank: int | None, world_size: int | None, prefetch: int
    ) -> None:
        super().__init__()
        self._given_rank = None if rank is None and world_size is None else _checked_rank(rank, world_size)
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}, it must not be negative")
        self.order = order
        """Plain values that determine the order, by name."""
        self._content, self._prefetch = content, prefetch
        self._epoch = self._consumed = self._given = 0
        self._worker: list[int] | None = None
        # Memory shared with persistent workers: how often the training loop has set the position, epoch, consumed.
        self._published, self._seen_version = _shared(torch.zeros(3, dtype=torch.int64)), 0
        self._unfinished_pass: tuple[int, int, int] | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the data and how it is loaded: everything that batches hold, whatever their order."""
        return self._content

    @property
    def generator(self) -> None:
        """None: no generator of torch changes the order. accelerate reads this before it shards a data set."""
        _refuse_second_sharding()

    @abstractmethod
    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch, of all ranks together."""

    @abstractmethod
    def read(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """Some batches of an epoch, by ascending number."""

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """This rank, and the number of ranks that batches are sharded over."""
        return self._given_rank or _own_rank()

    @property
    def world_size(self) -> int:
        """Number of ranks that batches are sharded over."""
        return self.rank_and_world_size[1]

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that each rank gets in an epoch, including those of weight zero."""
        return -(-self.num_batches(epoch) // self.world_size)

    def batches_until(self, end: float) -> int:
        """Batches that each rank gets from the current position to the end of `end` epochs, which may be a fraction.

        A fraction of an epoch is that fraction of its batches of all ranks together, rounded up.
        """
        (epoch, consumed), count = (self._epoch, self._consumed), 0
        while epoch < end:
            batches = math.ceil(min(1.0, end - epoch) * self.num_batches(epoch))
            count += max(0, -(-(batches - consumed) // self.world_size))
            epoch, consumed = epoch + 1, 0
        return count

    def __len__(self) -> int:
        """Batches that each rank gets in the current epoch, from its beginning."""
        return self.batches_per_epoch(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; at its end, the state is the beginning of the next one."""
        _refuse_second_sharding()
        self._sync_worker()
        if self._consumed >= self.num_batches(self._epoch):
            self.set_epoch(self._epoch + 1)
        epoch, total, (rank, world) = self._epoch, self.num_batches(self._epoch), self.rank_and_world_size
        rounds = self._rounds(total)
        numbers = [min(start + rank, total - 1) for start in rounds]
        with contextlib.closing(prefetched(self.read(epoch, numbers), ahead=self._prefetch)) as batches:
            for start, number, batch in zip(rounds, numbers, batches, strict=True):
                consumed = min(start + world, total)
                if self._worker is None:
                    self._consumed = consumed
                else:
                    self._given += 1
                own = batch if number == start + rank else batch.without_weight()
                yield replace(own, cursor=stream_position(epoch, consumed, num_batches=total))
        self._unfinished_pass = None
        self.set_epoch(epoch + 1)

    def _sync_worker(self) -> None:
        """In a persistent worker, read the position that the training loop has set, or restart an unfinished pass."""
        if get_worker_info() is None:
            return
        version, epoch, consumed = self._published.tolist()
        if version != self._seen_version:
            self._seen_version, self._epoch, self._consumed, self._given = version, epoch, consumed, 0
        elif self._unfinished_pass is not None:
            self._epoch, self._consumed, self._given = self._unfinished_pass
        self._unfinished_pass = self._epoch, self._consumed, self._given

    def _publish_position(self) -> None:
        """In the training loop's process, let persistent workers know the position."""
        if get_worker_info() is None:
            self._seen_version += 1
            self._published.copy_(torch.tensor([self._seen_version, self._epoch, self._consumed]))

    def _rounds(self, total: int) -> Sequence[int]:
        """First batches of the remaining rounds; in a loader's worker, of those that it has to read."""
        info, world = get_worker_info(), self.world_size
        worker = None if info is None else [info.id, info.num_workers, world]
        if self._given and self._worker != worker:
            raise ResumeMismatch(saved=str(self._worker), current=str(worker), what="worker, workers and ranks")
        self._worker = worker
        rounds = range(self._consumed, total, world)
        return rounds if info is None else rounds[info.id :: info.num_workers][self._given :]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; does nothing if it is the current one."""
        if epoch != self._epoch:
            self._epoch, self._consumed, self._given = epoch, 0, 0
        self._publish_position()

    def state_dict(self) -> StreamState:
        """The values that determine the order, the epoch, and how many of its batches all ranks together have had.

        In a loader's worker it also has the worker's number; that state is for the same worker of the same number.
        """
        epoch, consumed = stream_position(self._epoch, self._consumed, num_batches=self.num_batches(self._epoch))
        state = {**self.order, "epoch": epoch, "consumed": consumed}
        return state if self._worker is None else {**state, "worker": self._worker, "given": self._given}

    def state_after(self, batch: Batch) -> StreamState:
        """State after training on a batch of this data set, however many batches the loader has made ahead."""
        assert batch.cursor is not None, "a batch of a data set has a cursor"
        epoch, consumed = batch.cursor
        return {**self.order, "epoch": epoch, "consumed": consumed}

    def load_state_dict(self, state: StreamState) -> None:
        """Continue from a state, saved with any number of ranks; running iterators are not affected.

        Raises:
            ResumeMismatch: it belongs to other data, or to another order of the same data.
        """
        check_state(state, self.order)
        self._epoch, self._consumed = state["epoch"], state["consumed"]
        self._worker, self._given = state.get("worker"), state.get("given", 0)
        self._unfinished_pass = None
        self._publish_position()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker gets a pickled copy: it cannot see what wraps its loader, nor is it in the process group of
        # its parent.
        _refuse_second_sharding()
        state = self.__dict__.copy()
        return {**state, "_given_rank": self.rank_and_world_size} if _in_group() else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._published = _shared(self._published)


def _checked_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None or world_size is None:
        raise ValueError("give both rank and world_size, or neither")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, it must be at least 0 and below world_size {world_size}")
    return rank, world_size


def _own_rank() -> tuple[int, int]:
    """Rank and world size of this process: torch.distributed's, or the environment's."""
    if _in_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _checked_rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _in_group() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _shared(tensor: Any) -> torch.Tensor:
    """The tensor in memory shared with workers; the same tensor if it is there already."""
    shared: torch.Tensor = tensor.share_memory_()
    return shared


def _refuse_second_sharding() -> None:
    """Raise ShardedTwice where accelerate is about to shard this data set's batches over its processes.

    accelerate's wrappers do not announce themselves to what they wrap, but they are on the stack when a batch is taken
    through them, and a forked worker keeps its parent's stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        wrapper = frame.f_code.co_qualname.partition(".")[0]
        if wrapper in _WRAPPERS and frame.f_globals.get("__name__") == "accelerate.data_loader":
            owner = frame.f_locals.get("self")
            # Read from the wrapper itself: to create a PartialState would join a process group.
            state = frame.f_locals if owner is None else {**vars(owner.__dict__.get("state", owner)), **vars(owner)}
            if (num_processes := state["num_processes"]) > 1:
                raise ShardedTwice(wrapper=wrapper, num_processes=num_processes)
        frame = frame.f_back
