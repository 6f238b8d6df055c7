"""Where slices end: ids of sequences in, in the order of one split and fold, the lengths of its slices out.

A slice ends after the sequence whose id is the least of those from the half of `most` to `most` that it could end
after. Ids are digests, so the end is settled by what the sequences are and not by how many there were before: where
sequences are added or taken away, the next cuts differ until two of them fall on one sequence, and from there all are
what they were. No slice is longer than `most`; but for the last, none is shorter than half of it.
"""

from __future__ import annotations

__all__ = ["SliceCut"]


class SliceCut:
    """Cuts the sequences of one split and fold; `most` ids are held."""

    def __init__(self, *, most: int) -> None:
        self._most, self._least = most, -(-most // 2)
        self._waiting: list[str] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that no slice has taken; at the end of the corpus, they are the last slice."""
        return len(self._waiting)

    def add(self, sequence_id: str) -> int:
        """Length of the slice that the first of those that wait are, now that this one has come; 0: none yet."""
        self._waiting.append(sequence_id)
        if len(self._waiting) < self._most:
            return 0
        length = 1 + min(range(self._least - 1, self._most), key=self._waiting.__getitem__)
        del self._waiting[:length]
        return length
