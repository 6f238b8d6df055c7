"""Opens the files of a source as streams of bytes, decompressed while they are read.

Any fsspec file system can be read. Objects of an S3-compatible server are read with the same client as outputs:
requests have a retry policy, and an object that changes while it is read is an error.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from softshard.records.digest import sha256_of_stream
from softshard.storage.compression import unpack
from softshard.storage.object_reader import open_object
from softshard.storage.s3 import S3, RetryPolicy

__all__ = ["content_version", "open_bucket", "open_input"]

_BLOCK_BYTES = 4 * 2**20
_CONNECT_SECONDS, _SILENCE_SECONDS = 30.0, 60.0


@contextlib.contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open a file as a stream of bytes, decompressed by its ending; memory does not grow with its size."""
    with _open_raw(uri) as raw, unpack(raw, uri=uri) as stream:
        yield stream


def content_version(uri: str) -> str:
    """Version of a file from its content alone; the whole file is read."""
    with _open_raw(uri) as raw:
        return f"sha256={sha256_of_stream(raw)}"


@contextlib.contextmanager
def _open_raw(uri: str) -> Iterator[BinaryIO]:
    if uri.startswith("s3://"):
        s3, bucket, key = open_bucket(uri)
        with open_object(s3, bucket=bucket, key=key, about=key, block_bytes=_BLOCK_BYTES) as stream:
            yield stream
        return
    if uri.startswith("file://"):
        # By its name as it was listed: fsspec takes `::` in it for a chain of file systems.
        with open(uri.removeprefix("file://"), "rb") as file:
            yield file
        return
    import fsspec

    is_web = uri.startswith(("http://", "https://"))
    with fsspec.open(uri, mode="rb", **(_web_options(uri) if is_web else {})) as raw:
        yield cast("BinaryIO", io.BufferedReader(_WebFile(raw), _BLOCK_BYTES)) if is_web else raw


def _web_options(uri: str) -> dict[str, Any]:
    import aiohttp

    # Documents are tokenised while a file is read, and aiohttp ends every request after five minutes in all.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
    # A server may declare a .gz file as compressed in transfer too; unpacked by aiohttp, it would be unpacked twice.
    return {"client_kwargs": {"timeout": timeout, "auto_decompress": not uri.endswith(".gz")}}


class _WebFile(io.RawIOBase):
    """A file of fsspec's over http, of which what cannot be read is an OSError."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _as_os_error():
            self._file.seek(offset, whence)
        return self.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        with _as_os_error():
            content: bytes = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise OSError("the server sends no parts of a file; download it, and name the copy") from error


def open_bucket(uri: str) -> tuple[S3, str, str]:
    """Client, bucket and key of an S3 URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return S3(uri=f"s3://{bucket}", retry=RetryPolicy()), bucket, key
