"""Sources of batches: what a training asks of one, and the one for sequences in memory.

In: sequences and a seed. Out: batches, an epoch at a time, in an order that is a function of the sequences, the seed
and the epoch; a state that can be left and taken up again after any batch.
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

__all__ = ["BatchSource", "StreamState", "TextBatches", "check_order", "endless", "standing"]

StreamState = dict[str, Any]


class BatchSource(Protocol):
    """Batches, an epoch after the other, that can be left and taken up again."""

    @property
    def digest(self) -> str:
        """Names what the batches hold, whatever their order."""

    @property
    def order(self) -> StreamState:
        """What the order hangs on, by name: plain values, the same wherever the iterator is."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches that the iterator gives in an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state to the end of its epoch, or of the next if none is left in it."""

    def state_dict(self) -> StreamState:
        """State after the last batch that was given: plain values."""

    def load_state_dict(self, state: StreamState) -> None:
        """Take up a state; iterators that run already do not see it. Raises ResumeMismatch for that of other data."""


def endless(source: BatchSource) -> Iterator[Batch]:
    """Batches from the current state on, over all epochs to come."""
    while True:
        yield from source


def standing(epoch: int, consumed: int, *, num_batches: int) -> tuple[int, int]:
    """Epoch and batches consumed; the end of an epoch is the beginning of the next, and has no other name."""
    return (epoch, consumed) if consumed < num_batches else (epoch + 1, 0)


def check_order(state: StreamState, order: StreamState) -> None:
    """Refuse a state of other data, or of another order of the same. Raises ResumeMismatch."""
    for what, current in order.items():
        if state.get(what) != current:
            raise ResumeMismatch(saved=str(state.get(what)), current=str(current), what=what)


class TextBatches:
    """Batches of sequences in memory with their own tokens as targets: cross-entropy. `name` says what they are for."""

    def __init__(
        self, sequences: Sequence[TokenSequence], *, seed: int, batch_tokens: int, name: str, packing: bool = False
    ) -> None:
        if not sequences:
            raise CorpusEmpty(counts={"sequences": 0}, split=name)
        self._content = canonical_digest(["text", name, [sequence.sequence_id for sequence in sequences]])
        self.order = {"manifest": self._content, "seed": seed, "batch_tokens": batch_tokens, "packing": packing}
        """What the order hangs on, by name."""
        self._sequences, self._seed = sequences, seed
        self._batch_tokens, self._packing = batch_tokens, packing
        self._lengths = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        self._epoch = self._consumed = 0
        self._planned: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the sequences and of what they are for."""
        return self._content

    def batches_per_epoch(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._plan(epoch)[1]) - 1

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state to the end of its epoch, or of the next if none is left in it."""
        if self._consumed >= self.batches_per_epoch(self._epoch):
            self._epoch, self._consumed = self._epoch + 1, 0
        order, bounds = self._plan(self._epoch)
        for index in range(self._consumed, len(bounds) - 1):
            rows = order[bounds[index] : bounds[index + 1]]
            batch = collate_text([self._sequences[row] for row in rows], packing=self._packing)
            self._consumed = index + 1
            yield batch
        self._epoch, self._consumed = self._epoch + 1, 0

    def state_dict(self) -> StreamState:
        """What the order hangs on, the epoch, and how many of its batches were given."""
        epoch, consumed = standing(self._epoch, self._consumed, num_batches=self.batches_per_epoch(self._epoch))
        return {**self.order, "epoch": epoch, "consumed": consumed}

    def load_state_dict(self, state: StreamState) -> None:
        """Take up a state; iterators that run already do not see it. Raises ResumeMismatch for another order."""
        check_order(state, self.order)
        self._epoch, self._consumed = state["epoch"], state["consumed"]

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._planned is None or self._planned[0] != epoch:
            generator = keyed_generator("softshard.order", self._content, self._seed, epoch, "rows")
            order = generator.permutation(len(self._sequences))
            bounds = batch_bounds(self._lengths[order], batch_tokens=self._batch_tokens, packing=self._packing)
            self._planned = epoch, order, bounds
        return self._planned[1:]
