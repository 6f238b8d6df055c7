"""Committed parts to rows, a record batch at a time.

Readers go by the manifest. A part's hash is checked before its first row is given.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.shard.decode import Block, Decoder, open_part
from softshard.shard.manifest import Receipt
from softshard.shard.schema import PART_SCHEMA, PartMetadata
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import Store

__all__ = ["PartReader", "Row", "read_checked", "read_row_group", "read_rows"]

Row = tuple[TokenSequence, SequenceTargets]

_TOKENS_AT_ONCE = 2**16
"""A whole row group of the usual length. Measured, a quarter of it takes a seventh more time, for the calls; more would
only take more memory where sequences are long."""


def read_checked(store: Store, receipt: Receipt) -> bytes:
    """Bytes of a committed part. Raises PartCorrupt when it is missing or is not what the receipt names."""
    uri = f"{store.uri}/{receipt.path}"
    try:
        content = store.read(receipt.path)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="the part is missing") from error
    digest = sha256_hex(content)
    if digest != receipt.sha256:
        problem = (
            f"has {len(content)} bytes with sha256 {digest[:16]},"
            f" its receipt names {receipt.num_bytes} with {receipt.sha256[:16]}"
        )
        raise PartCorrupt(uri=uri, problem=problem)
    return content


class PartReader:
    """The row groups of one part, whose bytes were checked. Raises PartCorrupt."""

    def __init__(self, content: bytes, *, uri: str) -> None:
        self._uri = uri
        self._file, self.metadata = open_part(content, uri=uri)
        self._decoder = Decoder(self.metadata, uri=uri)

    @property
    def num_groups(self) -> int:
        """Row groups of the part."""
        return int(self._file.num_row_groups)

    def blocks(self, group: int, *, draw: int = 0, with_scores: bool = False) -> Iterator[Block]:
        """Rows of one row group in their order, some at a time; arguments as in `Decoder`. Raises PartCorrupt."""
        columns = Decoder.columns(with_scores=with_scores)
        try:
            rows_at_once = self._rows_at_once(group)
            batches = self._file.iter_batches(batch_size=rows_at_once, row_groups=[group], columns=columns)
            for batch in batches:
                yield self._decoder.block(batch, draw=draw)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(group, error) from error

    def rows(self, group: int) -> list[Row]:
        """All rows of one row group, one by one and with all that is stored of them. Raises PartCorrupt."""
        try:
            batches = self._file.read_row_group(group).to_batches()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(group, error) from error
        return [row for batch in batches for row in self._decoder.rows(batch)]

    def _rows_at_once(self, group: int) -> int:
        """Rows of about `_TOKENS_AT_ONCE`, by the number of tokens that the footer names."""
        footer = self._file.metadata.row_group(group)
        tokens = footer.column(PART_SCHEMA.names.index("token_ids")).num_values
        return max(1, int(footer.num_rows) * _TOKENS_AT_ONCE // max(int(tokens), 1))

    def _unreadable(self, group: int, error: Exception) -> PartCorrupt:
        return PartCorrupt(uri=self._uri, problem=f"row group {group} cannot be decompressed: {error}")


def read_row_group(content: bytes, group: int, *, uri: str) -> tuple[list[Row], PartMetadata]:
    """Rows of one row group of a part, whose bytes were checked. Raises PartCorrupt."""
    reader = PartReader(content, uri=uri)
    return reader.rows(group), reader.metadata


def read_rows(store: Store, receipt: Receipt) -> Iterator[tuple[Row, PartMetadata]]:
    """All rows of a committed part in their order, with the part's metadata; one row group is held at a time."""
    reader = PartReader(read_checked(store, receipt), uri=f"{store.uri}/{receipt.path}")
    for group in range(reader.num_groups):
        for row in reader.rows(group):
            yield row, reader.metadata
