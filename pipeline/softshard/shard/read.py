"""Committed parts to rows, a record batch at a time.

Readers go by the manifest. A part's hash is checked before its first row is given.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from softshard.errors import PartCorrupt
from softshard.shard.encode import decode_batch, open_part
from softshard.shard.manifest import Receipt
from softshard.shard.schema import PartMetadata
from softshard.storage import Store, sha256_of
from softshard.target.types import SequenceTargets, TokenSequence

__all__ = ["Row", "read_checked", "read_row_group", "read_rows"]

Row = tuple[TokenSequence, SequenceTargets]


def read_checked(store: Store, receipt: Receipt) -> bytes:
    """Bytes of a committed part. Raises PartCorrupt when it is missing or is not what the receipt names."""
    uri = f"{store.uri}/{receipt.path}"
    try:
        content = store.read(receipt.path)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="the part is missing") from error
    digest = sha256_of(content)
    if digest != receipt.sha256:
        problem = (
            f"has {len(content)} bytes with sha256 {digest[:16]},"
            f" its receipt names {receipt.num_bytes} with {receipt.sha256[:16]}"
        )
        raise PartCorrupt(uri=uri, problem=problem)
    return content


def read_row_group(content: bytes, group: int, *, uri: str) -> tuple[list[Row], PartMetadata]:
    """Rows of one row group of a part, whose bytes were checked. Raises PartCorrupt."""
    file, metadata = open_part(content, uri=uri)
    try:
        batches = file.read_row_group(group).to_batches()
    except (pa.ArrowException, OSError) as error:
        raise PartCorrupt(uri=uri, problem=f"row group {group} cannot be decompressed: {error}") from error
    return [row for batch in batches for row in decode_batch(batch, metadata=metadata, uri=uri)], metadata


def read_rows(store: Store, receipt: Receipt) -> Iterator[tuple[Row, PartMetadata]]:
    """All rows of a committed part in their order, with the part's metadata; one row group is held at a time."""
    uri = f"{store.uri}/{receipt.path}"
    content = read_checked(store, receipt)
    file, _ = open_part(content, uri=uri)
    for group in range(file.num_row_groups):
        rows, metadata = read_row_group(content, group, uri=uri)
        for row in rows:
            yield row, metadata
