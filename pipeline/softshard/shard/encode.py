"""Encodes sequences and their targets as the bytes of a part.

The bytes are a function of the rows, the metadata, the encoding and the version of pyarrow. Encodings are per column:
pyarrow expects the full name of the leaf and silently ignores any other name, so a test reads the encodings back.

Parquet allows BYTE_STREAM_SPLIT for integers since its version 2.11 of 2024. For readers that do not know it, portable
parts have plain values and dictionaries in its place: 27.2 bytes per position where compact ones took 23.4.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softshard.shard.labels import encode_labels
from softshard.shard.schema import LABEL_COLUMNS, METADATA_KEY, PART_SCHEMAS, PartMetadata
from softshard.sketch.codec import (
    counts_to_offsets,
    encode_head,
    encode_tail,
    frequent_ids,
    ids_by_rank,
    to_logprob_grid,
    to_mass_grid,
    token_ranks,
)
from softshard.sketch.types import SequenceTargets, TokenSequence

__all__ = ["encode_part"]

_INTEGERS = tuple(
    f"{name}.list.element"
    for name in ("token_ids", "label_runs", "tail_count", "head_ranks", "head_steps", "tail_gaps")
)
_DICTIONARY = (
    "source",
    "style",
    "group",
    "fold",
    "label_logprob.list.element",
    "entropy.list.element",
    "tail_mass.list.element",
    "head_count.list.element",
)
_PER_LABEL = ("label_logprob", "entropy", "tail_mass", "head_count")
_ROWS_PER_GROUP = 128
_ENCODINGS = {"compact": "BYTE_STREAM_SPLIT", "portable": "PLAIN"}
_REPETITIVE = ("tail_count.list.element", "head_steps.list.element")
"""Integers of few values. Without BYTE_STREAM_SPLIT, a dictionary of them takes three quarters of the bytes; of the
others it takes more, as does DELTA_BINARY_PACKED of all."""
_LEVEL = 9
"""BYTE_STREAM_SPLIT gives zstd skewed bytes without repetitions, so levels differ little: level 3 makes 1% more bytes
in two thirds of the time, level 15 makes 1.5% fewer in three times the time."""


def encode_part(
    rows: Sequence[tuple[TokenSequence, SequenceTargets]],
    *,
    fold: int,
    metadata: PartMetadata,
    encoding: Literal["compact", "portable"] = "compact",
) -> bytes:
    """A whole part: Parquet, zstd, one row per sequence in the order given, 128 rows per row group.

    The part's frequent ids are chosen here; those of `metadata` are ignored. Both encodings hold the same values.

    Raises:
        ValueError: `metadata` says version 1, and the labels of a sequence do not run to its end.
    """
    table, frequent = _table(rows, fold, metadata)
    complete = metadata.model_copy(update={"frequent_ids": tuple(frequent.tolist())})
    dictionary = [*_DICTIONARY, *(_REPETITIVE if encoding == "portable" else ())]
    sink = io.BytesIO()
    # Without the Arrow schema, which would repeat the metadata: Parquet's own types are enough.
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=dictionary,
        column_encoding={name: _ENCODINGS[encoding] for name in _INTEGERS if name not in dictionary},
        write_statistics=[field.name for field in table.schema if not pa.types.is_list(field.type)],
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
        writer.add_key_value_metadata({METADATA_KEY: complete.model_dump_json().encode()})
    return sink.getvalue()


def _table(
    rows: Sequence[tuple[TokenSequence, SequenceTargets]], fold: int, metadata: PartMetadata
) -> tuple[pa.Table, NDArray[np.int32]]:
    """The rows as a table, and the ids that have the first ranks in it."""
    sequences = [sequence for sequence, _ in rows]
    targets = [target for _, target in rows]
    flat = {name: _joined(targets, name) for name in (field.name for field in fields(SequenceTargets))}
    frequent = frequent_ids(np.concatenate([flat["head_ids"], flat["tail_ids"]]), vocab_size=metadata.vocab_size)
    ranks = token_ranks(ids_by_rank(frequent, vocab_size=metadata.vocab_size))
    schema = PART_SCHEMAS[metadata.schema_version]
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(sequence, name) for sequence in sequences], schema.field(name).type)
        for name in ("sequence_id", "document_id", "source", "style", "group", "start")
    }
    columns[LABEL_COLUMNS[metadata.schema_version]] = encode_labels(sequences, version=metadata.schema_version)
    columns["fold"] = pa.array([fold] * len(rows), pa.int16())
    columns["mean_entropy"] = pa.array([_mean(t.entropy) for t in targets], pa.float32())
    columns["mean_label_logprob"] = pa.array([_mean(t.label_logprob) for t in targets], pa.float32())
    lists: dict[str, NDArray[Any]] = {
        "token_ids": np.concatenate([sequence.token_ids for sequence in sequences] or [np.zeros(0, np.int32)]),
        "label_logprob": to_logprob_grid(flat["label_logprob"]),
        "entropy": to_logprob_grid(flat["entropy"]),
        "tail_mass": to_mass_grid(flat["tail_mass"], tau=metadata.tau),
        "head_count": flat["head_count"],
        "tail_count": flat["tail_count"],
        "head_ranks": ranks[flat["head_ids"]],
        "head_steps": encode_head(flat["head_logprobs"], flat["head_count"], step=metadata.step),
        "tail_gaps": encode_tail(ranks[flat["tail_ids"]], flat["tail_count"]),
    }
    lengths: dict[str, list[int]] = {
        **{name: [target.num_labels for target in targets] for name in _PER_LABEL},
        "token_ids": [len(sequence.token_ids) for sequence in sequences],
        "tail_count": [len(target.tail_count) for target in targets],
        "head_ranks": [len(target.head_ids) for target in targets],
        "head_steps": [len(target.head_ids) - int(np.count_nonzero(target.head_count)) for target in targets],
        "tail_gaps": [len(target.tail_ids) for target in targets],
    }
    columns.update({name: _lists(flat, lengths[name], schema.field(name).type) for name, flat in lists.items()})
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema), frequent


def _joined(targets: Sequence[SequenceTargets], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(target, name) for target in targets]) if targets else np.zeros(0, np.int32)


def _mean(values: NDArray[np.float32]) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0


def _lists(flat: NDArray[Any], lengths: Sequence[int], kind: pa.DataType) -> pa.ListArray:
    offsets = counts_to_offsets(np.array(lengths, dtype=np.int32)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type), type=kind)
