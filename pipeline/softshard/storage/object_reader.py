"""Opens an object as a stream with random access, which fetches ranges of one version of the object."""

from __future__ import annotations

import io
import os
from typing import BinaryIO, cast

from softshard.storage.outages import InputChanged
from softshard.storage.s3 import S3, ConditionFailed

__all__ = ["open_object"]


def open_object(s3: S3, *, bucket: str, key: str, about: str, block_bytes: int) -> BinaryIO:
    """Open an object; at least `block_bytes` are fetched at a time.

    Raises:
        FileNotFoundError: there is no such object.
        InputChanged: while reading: the object was replaced after it was opened.
        StoreUnavailable, StoreUnusable: also while reading.
    """
    head = s3.call("head_object", about=about, Bucket=bucket, Key=key)
    raw = _ObjectStream(s3, bucket=bucket, key=key, about=about, size=head["ContentLength"], etag=head["ETag"])
    return cast("BinaryIO", io.BufferedReader(raw, block_bytes))


class _ObjectStream(io.RawIOBase):
    def __init__(self, s3: S3, *, bucket: str, key: str, about: str, size: int, etag: str) -> None:
        super().__init__()
        self._s3, self._about = s3, about
        self._object = {"Bucket": bucket, "Key": key, "IfMatch": etag}
        self._size, self._place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        content = self._fetch(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._fetch(self._size)

    def _fetch(self, length: int) -> bytes:
        stop = min(self._place + length, self._size)
        if stop <= self._place:
            return b""
        wanted = f"bytes={self._place}-{stop - 1}"
        try:
            content: bytes = self._s3.call("get_object", about=self._about, Range=wanted, **self._object)["Content"]
        except ConditionFailed:
            raise InputChanged("the object was replaced while it was read") from None
        if len(content) != stop - self._place:
            raise OSError(f"the server answered {wanted} with {len(content)} bytes")
        self._place = stop
        return content
