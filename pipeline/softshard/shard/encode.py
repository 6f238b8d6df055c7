"""Sequences and their targets to the bytes of a part, and back.

The bytes are a function of the rows, the metadata and the version of pyarrow. Encodings are per column: pyarrow wants
the leaf's whole name and ignores another in silence, so a test reads them back.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softshard.errors import PartCorrupt
from softshard.shard.schema import METADATA_KEY, PART_SCHEMA, PartMetadata, metadata_of
from softshard.target.codec import decode_head, encode_head, offsets_of, to_logprob_grid, to_mass_grid
from softshard.target.types import SequenceTargets, TokenSequence

__all__ = ["decode_batch", "decode_part", "encode_part", "open_part"]

_SPLIT = ("token_ids", "head_ids", "tail_ids")
_DICTIONARY = (
    "source",
    "style",
    "group",
    "fold",
    "label_logprob.list.element",
    "entropy.list.element",
    "tail_mass.list.element",
    "head_count.list.element",
    "tail_count.list.element",
    "head_steps.list.element",
)
_ROWS_PER_GROUP = 64


def encode_part(rows: Sequence[tuple[TokenSequence, SequenceTargets]], *, fold: int, metadata: PartMetadata) -> bytes:
    """A whole part: Parquet, zstd, one row a sequence in the order given, 64 rows a row group."""
    table = _table(rows, fold, metadata)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        compression_level=9,
        use_dictionary=list(_DICTIONARY),
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT},
        write_page_checksum=True,
        store_schema=True,
    )
    return sink.getvalue()


def _table(rows: Sequence[tuple[TokenSequence, SequenceTargets]], fold: int, metadata: PartMetadata) -> pa.Table:
    sequences = [sequence for sequence, _ in rows]
    targets = [target for _, target in rows]
    steps = [encode_head(t.head_logprobs, t.head_count, step=metadata.step) for t in targets]
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(sequence, name) for sequence in sequences], pa.string())
        for name in ("sequence_id", "document_id", "source", "style", "group")
    }
    columns["fold"] = pa.array([fold] * len(rows), pa.int16())
    columns["start"] = pa.array([sequence.start for sequence in sequences], pa.int32())
    columns["first_label"] = pa.array([sequence.first_label for sequence in sequences], pa.int32())
    columns["mean_entropy"] = pa.array([_mean(t.entropy) for t in targets], pa.float32())
    columns["mean_label_logprob"] = pa.array([_mean(t.label_logprob) for t in targets], pa.float32())
    columns["token_ids"] = _lists("token_ids", [sequence.token_ids for sequence in sequences])
    columns["label_logprob"] = _lists("label_logprob", [to_logprob_grid(t.label_logprob) for t in targets])
    columns["entropy"] = _lists("entropy", [to_logprob_grid(t.entropy) for t in targets])
    columns["tail_mass"] = _lists("tail_mass", [to_mass_grid(t.tail_mass) for t in targets])
    for name in ("head_count", "tail_count", "head_ids", "tail_ids"):
        columns[name] = _lists(name, [getattr(t, name) for t in targets])
    columns["head_steps"] = _lists("head_steps", steps)
    schema = PART_SCHEMA.with_metadata({METADATA_KEY: metadata.model_dump_json().encode()})
    return pa.Table.from_arrays([columns[name] for name in PART_SCHEMA.names], schema=schema)


def _mean(values: NDArray[np.float32]) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0


def _lists(name: str, values: Sequence[NDArray[Any]]) -> pa.ListArray:
    kind = PART_SCHEMA.field(name).type
    flat = np.concatenate(values) if values else np.zeros(0)
    offsets = offsets_of(np.array([len(value) for value in values], dtype=np.int32)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type), type=kind)


def open_part(content: bytes | pa.Buffer, *, uri: str) -> tuple[pq.ParquetFile, PartMetadata]:
    """A part's file and metadata, nothing decoded yet. Raises PartCorrupt."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise PartCorrupt(uri=uri, problem=f"is not readable as Parquet: {error}") from error
    return file, metadata_of(file.schema_arrow, uri=uri)


def decode_part(
    content: bytes | pa.Buffer, *, uri: str
) -> tuple[list[tuple[TokenSequence, SequenceTargets]], PartMetadata]:
    """All rows of a part, with what the file holds of the targets. Raises PartCorrupt."""
    file, metadata = open_part(content, uri=uri)
    try:
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise PartCorrupt(uri=uri, problem=f"cannot be decompressed: {error}") from error
    rows = [row for batch in table.to_batches() for row in decode_batch(batch, step=metadata.step, uri=uri)]
    return rows, metadata


def decode_batch(batch: pa.RecordBatch, *, step: float, uri: str) -> list[tuple[TokenSequence, SequenceTargets]]:
    """Rows of a record batch that has all columns. Raises PartCorrupt when the lists of a row do not fit together."""
    plain = {name: batch.column(name).to_pylist() for name in PART_SCHEMA.names[:8]}
    lists = {name: _split(batch.column(name)) for name in PART_SCHEMA.names[10:]}
    rows = []
    for index in range(batch.num_rows):
        row = {name: values[index] for name, values in lists.items()}
        first_label = plain["first_label"][index]
        _check_lengths(row, first_label, uri=uri, sequence_id=plain["sequence_id"][index])
        sequence = TokenSequence(
            **{
                name: plain[name][index] for name in ("sequence_id", "document_id", "source", "style", "group", "start")
            },
            first_label=first_label,
            token_ids=row["token_ids"],
        )
        steps = decode_head(row["head_steps"], row["head_count"])
        targets = SequenceTargets(
            **{name: row[name] for name in ("label_logprob", "entropy", "tail_mass", "head_count", "tail_count")},
            head_ids=row["head_ids"],
            head_logprobs=(steps * -step).astype(np.float32),
            tail_ids=row["tail_ids"],
        )
        rows.append((sequence, targets))
    return rows


def _split(column: pa.Array) -> list[NDArray[Any]]:
    flat = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _check_lengths(row: dict[str, NDArray[Any]], first_label: int, *, uri: str, sequence_id: str) -> None:
    labels = len(row["token_ids"]) - first_label
    wrong = [
        name
        for name in ("label_logprob", "entropy", "tail_mass", "head_count", "tail_count")
        if len(row[name]) != labels
    ]
    if labels < 1 or first_label < 1 or wrong:
        raise PartCorrupt(
            uri=uri,
            problem=f"sequence {sequence_id}: {', '.join(wrong) or 'first_label'} does not fit its tokens",
        )
    heads, tails = int(row["head_count"].sum()), int(row["tail_count"].sum())
    if len(row["head_ids"]) != heads or len(row["head_steps"]) != heads or len(row["tail_ids"]) != tails:
        raise PartCorrupt(uri=uri, problem=f"sequence {sequence_id}: entries and counts do not fit together")
