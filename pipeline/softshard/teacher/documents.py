"""The documents that an adapter was trained on: a Parquet file beside its weights, and digests for comparison.

Each row is a document: its own fold, which is never the adapter's, and its 16-byte id, sorted by fold and then in the
order of training.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softshard.errors import PartCorrupt
from softshard.shard.files import parquet_errors

if TYPE_CHECKING:
    import polars as pl

__all__ = ["DOCUMENTS_FILE", "TrainedDocuments", "decode_documents", "encode_documents"]

DOCUMENTS_FILE = "documents.parquet"
_ID_BYTES = 16
_SCHEMA = pa.schema(
    [pa.field("fold", pa.int16(), nullable=False), pa.field("document_id", pa.binary(_ID_BYTES), nullable=False)]
)


@dataclass(frozen=True, slots=True)
class TrainedDocuments:
    """Ids of documents by the fold that they belong to."""

    ids: Mapping[int, bytes]
    """By fold: 16 bytes per document, in their order."""

    def __len__(self) -> int:
        return sum(len(packed) for packed in self.ids.values()) // _ID_BYTES

    def in_order(self) -> list[str]:
        """All ids in hex, by fold and then in their order."""
        packed = b"".join(self.ids[fold] for fold in sorted(self.ids)).hex()
        return [packed[at : at + 2 * _ID_BYTES] for at in range(0, len(packed), 2 * _ID_BYTES)]

    def series(self) -> pl.Series:
        """All ids, 16 bytes each, by fold and then in their order."""
        import polars as pl

        packed = b"".join(self.ids[fold] for fold in sorted(self.ids))
        return pl.Series("document_id", np.frombuffer(packed, dtype=f"V{_ID_BYTES}").tolist(), dtype=pl.Binary)

    def digests(self, folds: Iterable[int]) -> tuple[str, ...]:
        """SHA-256 of the ids in each of these folds, comparable with the corpus manifest's digests of whole folds."""
        return tuple(hashlib.sha256(self.ids.get(fold, b"")).hexdigest() for fold in folds)


def encode_documents(documents: TrainedDocuments) -> bytes:
    """Bytes of the file."""
    folds = sorted(documents.ids)
    rows = [len(documents.ids[fold]) // _ID_BYTES for fold in folds]
    packed = pa.py_buffer(b"".join(documents.ids[fold] for fold in folds))
    columns = [
        pa.array(np.repeat(np.array(folds, np.int16), rows)),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(_ID_BYTES), sum(rows), [None, packed]),
    ]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=_SCHEMA),
        sink,
        compression="zstd",
        use_dictionary=["fold"],
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_documents(content: bytes, *, uri: str) -> TrainedDocuments:
    """Documents in the file. Raises PartCorrupt when it is not Parquet or has other columns."""
    with parquet_errors(uri):
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    if not table.schema.remove_metadata().equals(_SCHEMA):
        raise PartCorrupt(uri=uri, problem="its columns are not those of a list of documents")
    folds = table.column("fold").to_numpy()
    ids = np.array(table.column("document_id").to_pylist(), dtype=f"V{_ID_BYTES}")
    return TrainedDocuments({int(fold): ids[folds == fold].tobytes() for fold in np.unique(folds)})
