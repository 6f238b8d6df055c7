"""A stream whose first bytes have been read to see what it holds."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

__all__ = ["PrefixedStream"]


class PrefixedStream(io.RawIOBase):
    """Bytes that were read from a stream, then the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the head, or else one read of the rest, goes."""
        piece = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)
