"""Sources of batches: the interface that a training needs, and the source for sequences in memory.

In: sequences and a seed. Out: batches, epoch by epoch, in an order that is a function of the sequences, the seed and
the epoch; a state that can be saved and restored after any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softshard.data.batch import Batch, collate_text
from softshard.data.shuffle import batch_bounds
from softshard.errors import CorpusEmpty, ResumeMismatch
from softshard.records.digest import canonical_digest
from softshard.records.seeds import keyed_generator
from softshard.sketch.types import TokenSequence

__all__ = ["BatchSource", "StreamState", "TextBatches", "check_state", "endless", "stream_position"]

StreamState = dict[str, Any]


class BatchSource(Protocol):
    """Batches, one epoch after another, whose state can be saved and restored."""

    @property
    def digest(self) -> str:
        """Identifies what the batches hold, whatever their order."""

    @property
    def order(self) -> StreamState:
        """Plain values that determine the order, by name; the same at every position."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that the iterator gives in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state to the end of its epoch, or of the next if none is left in it."""

    def state_dict(self) -> StreamState:
        """State after the last batch that was given, as plain values."""

    def load_state_dict(self, state: StreamState) -> None:
        """Continue from a state; running iterators are not affected. Raises ResumeMismatch for one of other data."""


def endless(source: BatchSource) -> Iterator[Batch]:
    """Batches from the current state on, over all following epochs."""
    while True:
        yield from source


def stream_position(epoch: int, consumed: int, *, num_batches: int) -> tuple[int, int]:
    """Epoch and batches consumed, where the end of an epoch is written as the beginning of the next."""
    return (epoch, consumed) if consumed < num_batches else (epoch + 1, 0)


def check_state(state: StreamState, order: StreamState) -> None:
    """Raise ResumeMismatch for a state of other data, or of another order of the same data."""
    for what, current in order.items():
        if state.get(what) != current:
            raise ResumeMismatch(saved=str(state.get(what)), current=str(current), what=what)


class TextBatches:
    """Batches of sequences in memory with their own tokens as targets: cross-entropy. `name` says what they are for,
    so that the same sequences have another order and another digest for another purpose."""

    def __init__(
        self, sequences: Sequence[TokenSequence], *, seed: int, batch_tokens: int, name: str, packing: bool = False
    ) -> None:
        if not sequences:
            raise CorpusEmpty(counts={"sequences": 0}, split=name)
        self._content = canonical_digest(["text", name, [sequence.sequence_id for sequence in sequences]])
        self.order = {"manifest": self._content, "seed": seed, "batch_tokens": batch_tokens, "packing": packing}
        """Plain values that determine the order, by name."""
        self._sequences, self._seed = sequences, seed
        self._batch_tokens, self._packing = batch_tokens, packing
        self._lengths = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        self._epoch = self._consumed = 0
        self._order_of_epoch: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the sequences and their name."""
        return self._content

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._epoch_order(epoch)[1]) - 1

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state to the end of its epoch, or of the next if none is left in it."""
        if self._consumed >= self.batches_per_epoch(self._epoch):
            self._epoch, self._consumed = self._epoch + 1, 0
        order, bounds = self._epoch_order(self._epoch)
        for index in range(self._consumed, len(bounds) - 1):
            rows = order[bounds[index] : bounds[index + 1]]
            batch = collate_text([self._sequences[row] for row in rows], packing=self._packing)
            self._consumed = index + 1
            yield batch
        self._epoch, self._consumed = self._epoch + 1, 0

    def state_dict(self) -> StreamState:
        """The values that determine the order, the epoch, and how many of its batches were given."""
        epoch, consumed = stream_position(self._epoch, self._consumed, num_batches=self.batches_per_epoch(self._epoch))
        return {**self.order, "epoch": epoch, "consumed": consumed}

    def load_state_dict(self, state: StreamState) -> None:
        """Continue from a state; running iterators are not affected. Raises ResumeMismatch for another order."""
        check_state(state, self.order)
        self._epoch, self._consumed = state["epoch"], state["consumed"]

    def _epoch_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._order_of_epoch is None or self._order_of_epoch[0] != epoch:
            generator = keyed_generator("softshard.order", self._content, self._seed, epoch, "rows")
            order = generator.permutation(len(self._sequences))
            bounds = batch_bounds(self._lengths[order], batch_tokens=self._batch_tokens, packing=self._packing)
            self._order_of_epoch = epoch, order, bounds
        return self._order_of_epoch[1:]
