"""Turns a stream of text in any encoding into UTF-8, while it is read.

A byte order mark decides before the settings do: a file that begins with one of UTF-8, UTF-16 or UTF-32 is read as
that. A file that is compressed and does not say so by its name is unpacked. What cannot be decoded becomes a byte that
is not UTF-8, so that it spoils its own document and no other.
"""

from __future__ import annotations

import codecs
import io
from typing import Any, BinaryIO, cast

from softshard.storage import PrefixedStream, unpack_by_content

__all__ = ["as_utf8", "is_utf8"]

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""That of UTF-32 begins with that of UTF-16."""
_HEAD_BYTES = 5
_CHUNK_BYTES = 2**16
_UNDECODABLE = "softshard-undecodable"

# A lone surrogate, which `surrogateescape` writes as the byte FF.
codecs.register_error(_UNDECODABLE, lambda error: ("\udcff", cast("UnicodeDecodeError", error).end))


def is_utf8(encoding: str) -> bool:
    """Whether a name is one of UTF-8's. Raises LookupError for a name that no encoding of text has."""
    codec = codecs.lookup(encoding)
    if not codec._is_text_encoding:
        raise LookupError(encoding)
    return codec.name in {"utf-8", "utf-8-sig", "ascii"}


def as_utf8(stream: BinaryIO, *, encoding: str) -> BinaryIO:
    """The stream in UTF-8, perhaps with a byte order mark; `encoding` is that of a stream without one."""
    head = b""
    while len(head) < _HEAD_BYTES and (piece := stream.read(_HEAD_BYTES - len(head))):
        head += piece
    whole = cast("BinaryIO", PrefixedStream(head, stream))
    if (unpacked := unpack_by_content(head, whole)) is not None:
        return as_utf8(unpacked, encoding=encoding)
    # A mark and nothing after it is no text.
    found = next((name for mark, name in _MARKS if head.startswith(mark) and len(head) > len(mark)), encoding)
    plain = whole if is_utf8(found) else _Decoded(whole, found)
    return cast("BinaryIO", io.BufferedReader(plain, _CHUNK_BYTES))


class _Decoded(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_UNDECODABLE)
        self._text, self._ended = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and not self._ended:
            chunk = self._stream.read(_CHUNK_BYTES)
            self._ended = not chunk
            text = self._decoder.decode(chunk, final=self._ended)
            self._text = memoryview(text.encode("utf-8", "surrogateescape"))
        length = min(len(buffer), len(self._text))
        buffer[:length] = self._text[:length]
        self._text = self._text[length:]
        return length
