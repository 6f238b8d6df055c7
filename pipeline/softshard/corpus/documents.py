"""The list of documents: Parquet files with one row per document, and statistics of them.

A file has a bounded number of rows, and the rows of one file are in memory at a time.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.corpus.counts import DocumentCount, GroupCount
from softshard.corpus.manifest import CorpusStatistics, DocumentsFile
from softshard.corpus.read import read_listed
from softshard.corpus.screen import ScreenedDocument
from softshard.records.digest import sha256_hex
from softshard.storage import Store

if TYPE_CHECKING:
    import polars as pl

__all__ = ["DOCUMENTS_SCHEMA", "DocumentsWriter", "corpus_statistics", "train_documents_outside", "train_groups"]

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
    """Writes one row per document, in the order given; some megabytes are in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: list[dict[str, Any]] = []
        self._files: list[DocumentsFile] = []
        self._train_ids = defaultdict[int, "hashlib._Hash"](hashlib.sha256)

    def add(self, document: ScreenedDocument, *, num_tokens: int, count: DocumentCount) -> None:
        """Add a document, of `num_tokens` tokens including BOS and EOS. Raises StorageFull, PartConflict."""
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
                "sequences": count.num_sequences,
                "labels": count.num_labels,
            }
        )
        if document.split == "train":
            self._train_ids[document.fold].update(bytes.fromhex(document.document_id))
        if len(self._rows) == _ROWS_PER_FILE:
            self._write()

    def train_digests(self, *, folds: int) -> tuple[str, ...]:
        """By fold: SHA-256 of the ids of its train documents so far, 16 bytes each, in their order."""
        return tuple(self._train_ids[fold].hexdigest() for fold in range(folds))

    def finish(self) -> tuple[DocumentsFile, ...]:
        """Write the remaining rows; all files, in order."""
        if self._rows:
            self._write()
        return tuple(self._files)

    def _write(self) -> None:
        sink = io.BytesIO()
        table = pa.Table.from_pylist(self._rows, schema=DOCUMENTS_SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        digest = sha256_hex(sink.getvalue())
        path = f"documents/{len(self._files):05d}-{digest[:16]}.parquet"
        self._store.put_once(path, sink.getvalue())
        self._files.append(DocumentsFile(path=path, sha256=digest, num_documents=len(self._rows)))
        self._rows = []


def train_documents_outside(store: Store, files: Sequence[DocumentsFile], *, fold: int) -> pl.Series:
    """Ids, 16 bytes each, of the train documents that are not in a fold.

    Raises:
        PartCorrupt: a list of documents is missing or is not the one that the manifest names.
    """
    import polars as pl

    found = [pl.Series("document_id", [], dtype=pl.Binary)]
    for file in files:
        rows = pl.read_parquet(io.BytesIO(read_listed(store, file)), columns=["document_id", "split", "fold"])
        outside = rows.filter((pl.col("split") == "train") & (pl.col("fold") != fold))
        found.append(outside["document_id"].str.decode("hex"))
    return pl.concat(found)


def train_groups(store: Store, files: Sequence[DocumentsFile]) -> tuple[GroupCount, ...]:
    """Labels of the train split by source, style, group and fold, sorted by these.

    Raises:
        PartCorrupt: a list of documents is missing or is not the one that the manifest names.
    """
    import polars as pl

    place = ["source", "style", "group", "fold"]
    counts = pl.DataFrame()
    for file in files:
        rows = pl.read_parquet(io.BytesIO(read_listed(store, file)), columns=[*place, "split", "labels"])
        found = rows.filter(pl.col("split") == "train").group_by(place).agg(pl.col("labels").sum())
        counts = pl.concat([counts, found]).group_by(place).agg(pl.col("labels").sum())
    return tuple(GroupCount(*row) for row in sorted(counts.iter_rows()))


def corpus_statistics(store: Store, files: Sequence[DocumentsFile]) -> tuple[CorpusStatistics, ...]:
    """Statistics by style, source and split, sorted by these.

    One file is in memory at a time; beyond that, memory grows with the number of different document lengths only.
    """
    import polars as pl

    place = ("style", "source", "split")
    counts = [pl.len().alias("documents"), pl.col("sequences").sum(), pl.col("labels").sum()]
    columns = [*place, "tokens", "sequences", "labels"]
    by_length = pl.DataFrame()
    for file in files:
        rows = pl.read_parquet(io.BytesIO(store.read(file.path)), columns=columns)
        found = rows.group_by(*place, "tokens").agg(counts)
        by_length = pl.concat([by_length, found]).group_by(*place, "tokens").agg(pl.exclude(*place, "tokens").sum())
    return tuple(
        _make_statistics(dict(zip(place, names, strict=True)), lengths)
        for names, lengths in sorted(by_length.partition_by(*place, as_dict=True).items())
    )


def _make_statistics(place: dict[str, Any], lengths: pl.DataFrame) -> CorpusStatistics:
    """Statistics from a table with one row per document length: tokens, documents, sequences, labels."""
    ordered = lengths.sort("tokens")
    tokens, documents = ordered["tokens"], ordered["documents"].cast(int)
    num_documents, num_tokens = int(documents.sum()), int((tokens * documents).sum())
    # The two documents in the middle; the same one twice when the number is odd.
    middle = [
        int(tokens[int(documents.cum_sum().search_sorted(n + 1))])
        for n in ((num_documents - 1) // 2, num_documents // 2)
    ]
    return CorpusStatistics(
        **place,
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_sequences=int(ordered["sequences"].sum()),
        num_labels=int(ordered["labels"].sum()),
        mean_tokens=num_tokens / num_documents,
        median_tokens=sum(middle) / 2,
        max_tokens=int(tokens[-1]),
    )
