"""The list of documents: screened documents in, Parquet files with a row each out, and statistics of these.

A file holds a bounded number of rows, and no more than one file's rows are held.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.corpus.manifest import CorpusStatistics, DocumentsFile
from softshard.corpus.screen import ScreenedDocument
from softshard.storage import LocalStore, Store, sha256_of

__all__ = ["DOCUMENTS_SCHEMA", "DocumentsWriter", "corpus_statistics"]

_ROWS_PER_FILE = 2**15

DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in (
            ("document_id", pa.string()),
            ("name", pa.string()),
            ("source", pa.string()),
            ("style", pa.string()),
            ("group", pa.string()),
            ("split", pa.string()),
            ("fold", pa.int16()),
            ("bytes", pa.int64()),
            ("tokens", pa.int64()),
            ("sequences", pa.int64()),
            ("labels", pa.int64()),
        )
    ]
)


class DocumentsWriter:
    """Writes a row a document, in the order given; some megabytes are held at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: list[dict[str, Any]] = []
        self._files: list[DocumentsFile] = []

    def add(self, document: ScreenedDocument, *, num_tokens: int, num_sequences: int) -> None:
        """Take a document of num_tokens tokens, opening and closing ones counted. Raises StorageFull, PartConflict."""
        self._rows.append(
            {
                "document_id": document.document_id,
                # A file's name may hold bytes that are not UTF-8.
                "name": document.name.encode(errors="backslashreplace").decode(),
                "source": document.source,
                "style": document.style,
                "group": document.group,
                "split": document.split,
                "fold": document.fold,
                "bytes": document.num_bytes,
                "tokens": num_tokens,
                "sequences": num_sequences,
                "labels": num_tokens - 1,
            }
        )
        if len(self._rows) == _ROWS_PER_FILE:
            self._write()

    def finish(self) -> tuple[DocumentsFile, ...]:
        """Write what waits. All files, in order."""
        if self._rows:
            self._write()
        return tuple(self._files)

    def _write(self) -> None:
        sink = io.BytesIO()
        table = pa.Table.from_pylist(self._rows, schema=DOCUMENTS_SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        digest = sha256_of(sink.getvalue())
        path = f"documents/{len(self._files):05d}-{digest[:16]}.parquet"
        self._store.put_once(path, sink.getvalue())
        self._files.append(DocumentsFile(path=path, sha256=digest, num_documents=len(self._rows)))
        self._rows = []


def corpus_statistics(store: LocalStore, files: Sequence[DocumentsFile]) -> tuple[CorpusStatistics, ...]:
    """Statistics by style, source and split, sorted by these; the files are scanned, never loaded whole."""
    import polars as pl

    tokens = pl.col("tokens")
    table = (
        pl.scan_parquet([store.local_path(file.path) for file in files], glob=False)
        .group_by("style", "source", "split")
        .agg(
            pl.len().alias("num_documents"),
            tokens.sum().alias("num_tokens"),
            pl.col("sequences").sum().alias("num_sequences"),
            pl.col("labels").sum().alias("num_labels"),
            tokens.mean().alias("mean_tokens"),
            tokens.median().alias("median_tokens"),
            tokens.max().alias("max_tokens"),
        )
        .sort("style", "source", "split")
        .collect(engine="streaming")
    )
    return tuple(CorpusStatistics.model_validate(row) for row in table.iter_rows(named=True))
