"""Content-defined boundaries of slices: cuts the sequences of one split and fold where their ids say.

A slice has between half of `max_length` and `max_length` sequences, and the last one may be shorter. Of the sequences
that it could end with, it ends with the one whose id is smallest. Ids are digests, so a boundary depends on the content
of the sequences and not on their number: after sequences are added or removed, the cuts differ until two of them fall
on the same sequence, and from there on all slices are unchanged.
"""

from __future__ import annotations

__all__ = ["SliceCutter"]


class SliceCutter:
    """Cuts the sequences of one split and fold; at most `max_length` ids are in memory."""

    def __init__(self, *, max_length: int) -> None:
        self._max_length, self._min_length = max_length, -(-max_length // 2)
        self._waiting: list[str] = []

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are in no slice yet; at the end of the corpus, they are the last slice."""
        return len(self._waiting)

    def add(self, sequence_id: str) -> int:
        """Add a sequence; the length of the slice that is now complete, made of the oldest sequences, or 0 for none."""
        self._waiting.append(sequence_id)
        if len(self._waiting) < self._max_length:
            return 0
        length = 1 + min(range(self._min_length - 1, self._max_length), key=self._waiting.__getitem__)
        del self._waiting[:length]
        return length
