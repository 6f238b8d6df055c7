"""Stored files that a receipt or a manifest names: read and compared with it, or refused with PartCorrupt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.storage import Store

__all__ = ["check_size", "parquet_errors", "read_checked"]


def read_checked(store: Store, path: str, *, sha256: str, named_by: str) -> bytes:
    """Read a file and compare it with its SHA-256.

    Args:
        store: the folder.
        path: of the file, below it.
        sha256: what it must be.
        named_by: the record that names the digest, for the error.

    Raises:
        PartCorrupt: the file is missing or has another digest.
    """
    uri = f"{store.uri}/{path}"
    try:
        content = store.read(path)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="is missing") from error
    if (digest := sha256_hex(content)) != sha256:
        problem = f"has {len(content):,} bytes with sha256 {digest[:16]}, {named_by} names {sha256[:16]}"
        raise PartCorrupt(uri=uri, problem=problem)
    return content


def check_size(num_bytes: int, *, expected: int, uri: str) -> None:
    """Compare the size of a part with the one in its receipt. Raises PartCorrupt."""
    if num_bytes != expected:
        raise PartCorrupt(uri=uri, problem=f"has {num_bytes:,} bytes, its receipt names {expected:,}")


@contextmanager
def parquet_errors(uri: str, *, place: str = "") -> Iterator[None]:
    """Inside this context, raise PartCorrupt for a file that is missing or that pyarrow cannot read.

    Args:
        uri: of the file.
        place: what of the file is read, for the error; empty for all of it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise PartCorrupt(uri=uri, problem=f"{place} is not readable as Parquet: {error}".strip()) from error
