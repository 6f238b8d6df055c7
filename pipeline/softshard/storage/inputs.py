"""Opens the files of a source as streams of bytes, decompressed while they are read.

Any fsspec file system can be read. Objects of an S3-compatible server are read with the same client as outputs:
requests have a retry policy, and an object that changes while it is read is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

from softshard.records.digest import sha256_of_stream
from softshard.storage.compression import unpack
from softshard.storage.object_reader import open_object
from softshard.storage.s3 import S3, RetryPolicy

__all__ = ["content_version", "open_bucket", "open_input"]

_BLOCK_BYTES = 4 * 2**20


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
    import fsspec

    with fsspec.open(uri, mode="rb") as raw:
        yield raw


def open_bucket(uri: str) -> tuple[S3, str, str]:
    """Client, bucket and key of an S3 URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return S3(uri=f"s3://{bucket}", retry=RetryPolicy()), bucket, key
