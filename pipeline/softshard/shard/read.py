"""Reads committed parts: their bytes, some of their columns, or their rows one record batch at a time.

The parts to read are those of the manifest. A part's hash is checked before its first row is returned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.shard.decode import Block, Decoder, open_part
from softshard.shard.files import check_size, parquet_errors, read_checked
from softshard.shard.manifest import Receipt
from softshard.shard.schema import PART_SCHEMAS, PartMetadata
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import Store

__all__ = ["PartReader", "Row", "open_committed", "read_columns", "read_part", "read_row_group", "read_rows"]

Row = tuple[TokenSequence, SequenceTargets]

_TOKENS_AT_ONCE = 2**16
"""About one row group of sequences of the usual length. Measured, a quarter of it takes a seventh more time because of
the calls; more would only take more memory where sequences are long."""


def read_part(store: Store, receipt: Receipt) -> bytes:
    """Bytes of a committed part. Raises PartCorrupt when it is missing or is not the one that its receipt names."""
    return read_checked(store, receipt.path, sha256=receipt.sha256, named_by="its receipt")


@contextmanager
def open_committed(store: Store, receipt: Receipt) -> Iterator[tuple[pq.ParquetFile, PartMetadata]]:
    """Open a committed part without reading all of it: its size is compared with the receipt, its hash is not.

    Raises:
        PartCorrupt: it is missing, has another size or cannot be decoded, also while it is read inside the context.
    """
    uri = f"{store.uri}/{receipt.path}"
    with parquet_errors(uri), store.open(receipt.path) as stream:
        check_size(stream.seek(0, os.SEEK_END), expected=receipt.num_bytes, uri=uri)
        stream.seek(0)
        yield open_part(stream, uri=uri)


def read_columns(store: Store, receipt: Receipt, columns: Sequence[str]) -> pa.Table:
    """Some columns of a committed part, whose hash is not checked. Raises PartCorrupt."""
    with open_committed(store, receipt) as (file, _):
        return file.read(columns=list(columns))


class PartReader:
    """Decodes the row groups of one part, whose bytes were checked. Raises PartCorrupt."""

    def __init__(self, content: bytes, *, uri: str) -> None:
        self._uri = uri
        self._file, self.metadata = open_part(content, uri=uri)
        self._decoder = Decoder(self.metadata, uri=uri)

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return int(self._file.num_row_groups)

    def blocks(self, group: int, *, draw: int = 0, with_scores: bool = False) -> Iterator[Block]:
        """Decode the rows of one row group, in order, block by block; arguments as in `Decoder`. Raises PartCorrupt."""
        columns = Decoder.columns(with_scores=with_scores, version=self.metadata.schema_version)
        with parquet_errors(self._uri, place=f"row group {group}"):
            rows_at_once = self._rows_at_once(group)
            for batch in self._file.iter_batches(batch_size=rows_at_once, row_groups=[group], columns=columns):
                yield self._decoder.block(batch, draw=draw)

    def rows(self, group: int) -> list[Row]:
        """Decode all rows of one row group, with everything that is stored about them. Raises PartCorrupt."""
        with parquet_errors(self._uri, place=f"row group {group}"):
            batches = self._file.read_row_group(group).to_batches()
        return [row for batch in batches for row in self._decoder.rows(batch)]

    def _rows_at_once(self, group: int) -> int:
        """Number of rows that have about `_TOKENS_AT_ONCE` tokens together, by the counts in the footer."""
        footer = self._file.metadata.row_group(group)
        tokens = footer.column(PART_SCHEMAS[self.metadata.schema_version].names.index("token_ids")).num_values
        return max(1, int(footer.num_rows) * _TOKENS_AT_ONCE // max(int(tokens), 1))


def read_row_group(content: bytes, group: int, *, uri: str) -> tuple[list[Row], PartMetadata]:
    """Rows of one row group of a part, whose bytes were checked. Raises PartCorrupt."""
    reader = PartReader(content, uri=uri)
    return reader.rows(group), reader.metadata


def read_rows(store: Store, receipt: Receipt) -> Iterator[tuple[Row, PartMetadata]]:
    """All rows of a committed part in their order, each with the part's metadata; one row group is in memory."""
    reader = PartReader(read_part(store, receipt), uri=f"{store.uri}/{receipt.path}")
    for group in range(reader.num_groups):
        for row in reader.rows(group):
            yield row, reader.metadata
