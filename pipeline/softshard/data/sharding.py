"""Batches in one global order, dealt to ranks and to the workers of their loaders.

In: batches by their number in an epoch. Out: this rank's, for torch's DataLoader or a plain loop. All ranks get the
same number of them, whatever the number of ranks and workers, and a state that was saved with one number of either is
taken up with any other. What is dealt here must not be dealt again: under accelerate's wrappers that is an error.
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
from softshard.data.text import StreamState, check_order, standing
from softshard.errors import ResumeMismatch, ShardedTwice

__all__ = ["ShardedBatches"]

_WRAPPERS = {"IterableDatasetShard", "DataLoaderDispatcher", "prepare_data_loader"}


class ShardedBatches(IterableDataset[Batch]):
    """One epoch of this rank's batches after another: each `iter` gives what is left of the current epoch.

    Batch i of a round goes to rank i, and in the last round a rank without one gets a copy of the epoch's last batch
    with weight zero. With a DataLoader (`batch_size=None`, any number of workers) batches come in the same order; the
    epochs then are told by `set_epoch`, and `state_after(batch)` is the state, for the workers' own copies of this data
    set are the ones that move; workers that live on hear of it between two epochs. torchdata's StatefulDataLoader keeps
    the states of its workers by itself.

    Where rank and world size are not given they are asked for with each epoch: a process group may be joined later.

    Args:
        order: plain values that the order hangs on, by name; they are part of the state.
        content: digest of all that batches hold.
        rank: of this process; None: torch.distributed's, or the environment's that torchrun sets, or 0.
        world_size: number of ranks; None as above, or 1.
        prefetch: batches that a thread makes ahead; 0: none.
    """

    def __init__(
        self, *, order: StreamState, content: str, rank: int | None, world_size: int | None, prefetch: int
    ) -> None:
        super().__init__()
        self._given_place = None if rank is None and world_size is None else _checked_place(rank, world_size)
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}, it must not be negative")
        self.order = order
        """What the order hangs on, by name."""
        self._content, self._prefetch = content, prefetch
        self._epoch = self._consumed = self._given = 0
        self._worker: list[int] | None = None
        # Shared with the workers of a loader, which may live on: how often the loop set the place, and to which.
        self._told, self._heard = _shared(torch.zeros(3, dtype=torch.int64)), 0
        self._broken_off: tuple[int, int, int] | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the data and of what is made of it: all that batches hold, whatever their order."""
        return self._content

    @property
    def generator(self) -> None:
        """None: no generator of torch moves the order. accelerate looks here when it is about to deal a data set."""
        _refuse_second_deal()

    @abstractmethod
    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch, of all ranks together."""

    @abstractmethod
    def read(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """Some batches of an epoch, by rising number."""

    @property
    def place(self) -> tuple[int, int]:
        """Rank and number of ranks that batches are dealt to."""
        return self._given_place or _own_place()

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that each rank gets in an epoch, those of weight zero counted."""
        return -(-self.num_batches(epoch) // self.place[1])

    def batches_until(self, end: float) -> int:
        """Batches that each rank gets from the current place to the end of `end` epochs, of the last a part if need be.

        A part of an epoch is as many batches of all ranks together, rounded up.
        """
        (epoch, consumed), count = (self._epoch, self._consumed), 0
        while epoch < end:
            batches = math.ceil(min(1.0, end - epoch) * self.num_batches(epoch))
            count += max(0, -(-(batches - consumed) // self.place[1]))
            epoch, consumed = epoch + 1, 0
        return count

    def __len__(self) -> int:
        """Batches that each rank gets in the current epoch, from its beginning."""
        return self.batches_per_epoch(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch; when it is over, the state is that of the next."""
        _refuse_second_deal()
        self._hear()
        if self._consumed >= self.num_batches(self._epoch):
            self.set_epoch(self._epoch + 1)
        epoch, total, (rank, world) = self._epoch, self.num_batches(self._epoch), self.place
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
                yield replace(own, cursor=standing(epoch, consumed, num_batches=total))
        self._broken_off = None
        self.set_epoch(epoch + 1)

    def _hear(self) -> None:
        """In a worker that lives on: take up what the loop has said since, or begin again what it has broken off."""
        if get_worker_info() is None:
            return
        times, epoch, consumed = self._told.tolist()
        if times != self._heard:
            self._heard, self._epoch, self._consumed, self._given = times, epoch, consumed, 0
        elif self._broken_off is not None:
            self._epoch, self._consumed, self._given = self._broken_off
        self._broken_off = self._epoch, self._consumed, self._given

    def _tell(self) -> None:
        if get_worker_info() is None:
            self._heard += 1
            self._told.copy_(torch.tensor([self._heard, self._epoch, self._consumed]))

    def _rounds(self, total: int) -> Sequence[int]:
        """First batches of the rounds that are left, of those that the worker has to read if this is one."""
        info, world = get_worker_info(), self.place[1]
        place = None if info is None else [info.id, info.num_workers, world]
        if self._given and self._worker != place:
            raise ResumeMismatch(saved=str(self._worker), current=str(place), what="worker, workers and ranks")
        self._worker = place
        rounds = range(self._consumed, total, world)
        return rounds if info is None else rounds[info.id :: info.num_workers][self._given :]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; nothing, if it is the current one."""
        if epoch != self._epoch:
            self._epoch, self._consumed, self._given = epoch, 0, 0
        self._tell()

    def state_dict(self) -> StreamState:
        """What the order hangs on, the epoch, and how many of its batches all ranks together had.

        A loader's worker adds its own place, and its state is for the same worker of as many again.
        """
        epoch, consumed = standing(self._epoch, self._consumed, num_batches=self.num_batches(self._epoch))
        state = {**self.order, "epoch": epoch, "consumed": consumed}
        return state if self._worker is None else {**state, "worker": self._worker, "given": self._given}

    def state_after(self, batch: Batch) -> StreamState:
        """State after a batch of this data set was trained on, however many the loader has made ahead."""
        assert batch.cursor is not None, "a batch of a data set has a cursor"
        epoch, consumed = batch.cursor
        return {**self.order, "epoch": epoch, "consumed": consumed}

    def load_state_dict(self, state: StreamState) -> None:
        """Take up a state, saved with any number of ranks; iterators that run already do not see it.

        Raises:
            ResumeMismatch: it belongs to other data, or to another order of the same.
        """
        check_order(state, self.order)
        self._epoch, self._consumed = state["epoch"], state["consumed"]
        self._worker, self._given = state.get("worker"), state.get("given", 0)
        self._broken_off = None
        self._tell()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned gets a pickled copy, and no longer sees who wraps its loader.
        # Nor is it in the process group of its parent.
        _refuse_second_deal()
        state = self.__dict__.copy()
        return {**state, "_given_place": self.place} if _in_group() else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._told = _shared(self._told)


def _checked_place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None or world_size is None:
        raise ValueError("give both rank and world_size, or neither")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, it must be from 0 to below world_size {world_size}")
    return rank, world_size


def _own_place() -> tuple[int, int]:
    """Rank and world size of this process: torch.distributed's, or the environment's."""
    if _in_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _checked_place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _in_group() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _shared(tensor: Any) -> torch.Tensor:
    """A tensor whose memory workers share; itself, where they do already."""
    shared: torch.Tensor = tensor.share_memory_()
    return shared


def _refuse_second_deal() -> None:
    """Raise ShardedTwice where accelerate is about to deal this data set's batches to its processes.

    Its wrappers tell what they wrap nothing, but they are on the stack of whoever takes a batch from them, and a worker
    that is forked keeps the stack of its parent.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        wrapper = frame.f_code.co_qualname.partition(".")[0]
        if wrapper in _WRAPPERS and frame.f_globals.get("__name__") == "accelerate.data_loader":
            owner = frame.f_locals.get("self")
            # Asked of the wrapper itself: a PartialState that is not there yet would join a process group.
            state = frame.f_locals if owner is None else {**vars(owner.__dict__.get("state", owner)), **vars(owner)}
            if (num_processes := state["num_processes"]) > 1:
                raise ShardedTwice(wrapper=wrapper, num_processes=num_processes)
        frame = frame.f_back
