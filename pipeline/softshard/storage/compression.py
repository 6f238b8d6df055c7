"""Unpacks compressed inputs while they are read; the ending of a file's name, in either case, says how it is packed.

Memory does not grow with the size of a file. A truncated file raises an error and is never taken for a complete one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from softshard.storage.prefixed import PrefixedStream

__all__ = ["COMPRESSIONS", "find_compression", "unpack", "unpack_by_content", "without_compression"]

COMPRESSIONS = (".zst", ".gz", ".bz2", ".xz")
"""Endings of compressed files."""

_MAGIC = {b"\x1f\x8b": ".gz", bytes.fromhex("28b52ffd"): ".zst", bytes.fromhex("fd377a585a"): ".xz"}
"""How files begin that no text begins like."""
_UNPACKED_BYTES = 2**18
_PYARROW_WINDOW_BYTES = 2**27
"""The largest window that pyarrow's zstandard accepts, 128 MiB."""
_LARGEST_WINDOW_BYTES = 2**31
"""The largest window of the format's own tool, `zstd --long=31`."""
_ZSTD_HEADER_BYTES = 18
_ZSTD_PIECE_BYTES = 2**11
"""Four bytes of zstandard can be 128 KiB of text, so this much becomes 64 MiB at most."""


def find_compression(uri: str) -> str | None:
    """The compression that a name ends with, in lower case; None for a file that is not compressed."""
    name = _name_in_archive(uri).lower()
    return next((ending for ending in COMPRESSIONS if name.endswith(ending)), None)


def without_compression(uri: str) -> str:
    """The name without the ending of its compression; of a file in an archive, its name there."""
    name, ending = _name_in_archive(uri), find_compression(uri)
    return name[: -len(ending)] if ending else name


def _name_in_archive(uri: str) -> str:
    """The name of a file in an archive, without the archive's: `zip://name::archive`."""
    return uri if "://" not in uri or uri.startswith("file://") else uri.partition("::")[0]


def unpack_by_content(head: bytes, whole: BinaryIO) -> BinaryIO | None:
    """The unpacked stream of a file that is compressed and does not say so by its name; None where it is not.

    Args:
        head: the first bytes, which in no compressed file but one of bzip2 are text.
        whole: the stream from its beginning.
    """
    ending = next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), None)
    return None if ending is None else _open(ending, whole)


@contextlib.contextmanager
def unpack(raw: BinaryIO, *, uri: str) -> Iterator[BinaryIO]:
    """The unpacked stream of a file of that name.

    Raises, while it is read: OSError, EOFError, zlib.error, lzma.LZMAError or pyarrow.ArrowException.
    """
    ending = find_compression(uri)
    if ending is None:
        yield raw
        return
    with _open(ending, raw) as stream:
        yield stream


def _open(ending: str, raw: BinaryIO) -> BinaryIO:
    if ending == ".zst":
        return _open_zstd(raw)
    import bz2
    import gzip
    import lzma

    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("BinaryIO", openers[ending](raw, "rb"))


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    import zstandard

    head = raw.read(_ZSTD_HEADER_BYTES)
    whole = PrefixedStream(head, raw)
    try:
        window_bytes = zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:
        window_bytes = 0  # pyarrow says what is wrong with the file
    if window_bytes > _PYARROW_WINDOW_BYTES:
        return cast("BinaryIO", io.BufferedReader(_LongWindow(whole), _UNPACKED_BYTES))
    import pyarrow as pa

    # zstandard's own reader takes a truncated file for a complete one; pyarrow's raises an error.
    stream = pa.CompressedInputStream(pa.PythonFile(whole, mode="r"), "zstd")
    return cast("BinaryIO", io.BufferedReader(stream, _UNPACKED_BYTES))


class _LongWindow(io.RawIOBase):
    """Frames of zstandard with a window of up to 2 GiB, which are held in memory while they are read."""

    def __init__(self, packed: io.RawIOBase) -> None:
        import zstandard

        self._packed = packed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._left, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and self._fill():
            pass
        length = min(len(buffer), len(self._text))
        buffer[:length] = self._text[:length]
        self._text = self._text[length:]
        return length

    def _fill(self) -> bool:
        """Unpack the next piece, if there is one."""
        piece = self._left or self._packed.read(_ZSTD_PIECE_BYTES)
        if not piece:
            if self._frame is not None:
                raise EOFError("the file ends in the middle of a frame")
            return False
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._text = memoryview(frame.decompress(piece))
        except self._error as error:
            raise OSError(str(error)) from error
        self._frame, self._left = (None, frame.unused_data) if frame.eof else (frame, b"")
        return True
