"""Slices: Parquet files of sequences, encoded and decoded, and the writer that divides a corpus into them.

A slice has the columns of a part that are known before the teacher runs. Its metadata names the tokenizer and the
settings of the windows. With one version of pyarrow, the same sequences give the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softshard.corpus.boundaries import SliceCutter
from softshard.corpus.manifest import CORPUS_VERSION, CorpusSlice
from softshard.corpus.screen import ScreenedDocument, Split
from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool
from softshard.shard.files import parquet_errors
from softshard.shard.schema import PART_SCHEMA, stored_first_label
from softshard.sketch.types import TokenSequence
from softshard.storage import Store

__all__ = ["SLICE_SCHEMA", "SliceWriter", "decode_slice", "encode_slice"]

_METADATA_KEY = b"softshard-corpus"
_PLAIN = ("sequence_id", "document_id", "source", "style", "group", "start")
_ROWS_PER_GROUP = 64

SLICE_SCHEMA = pa.schema([PART_SCHEMA.field(name) for name in (*_PLAIN, "first_label", "token_ids")])


def encode_slice(sequences: Sequence[TokenSequence], *, metadata: dict[str, str | int]) -> bytes:
    """A whole slice, one row per sequence in the order given. Raises LabelsNotStorable as `encode_part` does."""
    columns = [pa.array([getattr(s, name) for s in sequences], SLICE_SCHEMA.field(name).type) for name in _PLAIN]
    columns.append(pa.array([stored_first_label(s) for s in sequences], pa.int32()))
    offsets = np.cumsum([0, *(len(s.token_ids) for s in sequences)], dtype=np.int32)
    flat = np.concatenate([s.token_ids for s in sequences])
    kind = SLICE_SCHEMA.field("token_ids").type
    columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()), type=kind))
    schema = SLICE_SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        use_dictionary=["document_id", "source", "style", "group", "first_label"],
        column_encoding={"token_ids.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_slice(content: bytes, *, uri: str) -> list[TokenSequence]:
    """Sequences of a slice, in their order. Raises PartCorrupt when it is not Parquet or not what a slice holds."""
    with parquet_errors(uri):
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    if not table.schema.remove_metadata().equals(SLICE_SCHEMA):
        raise PartCorrupt(uri=uri, problem=f"its columns are not those of corpus version {CORPUS_VERSION}")
    plain = table.select(list(_PLAIN)).to_pylist()
    column = table.column("token_ids").combine_chunks()
    lengths = column.value_lengths().to_numpy()
    token_ids = np.split(column.flatten().to_numpy(), np.cumsum(lengths)[:-1]) if len(plain) else []
    firsts = table.column("first_label").to_pylist()
    try:
        return [
            TokenSequence(**row, token_ids=ids, label_spans=((first, len(ids)),))
            for row, first, ids in zip(plain, firsts, token_ids, strict=True)
        ]
    except ValueError as error:
        raise PartCorrupt(uri=uri, problem=str(error)) from error


@dataclass(slots=True)
class _Waiting:
    """Sequences of one split and fold that are not written yet."""

    cutter: SliceCutter
    sequences: list[TokenSequence] = field(default_factory=list)
    num_bytes_text: list[int] = field(default_factory=list)
    """For each sequence: bytes of the document that starts with it, or 0."""


class SliceWriter:
    """Writes sequences in slices by split and fold, cut by `SliceCutter`.

    Of each split and fold, at most the sequences of one slice are in memory.
    """

    def __init__(self, store: Store, *, sequences_per_slice: int, metadata: dict[str, str | int]) -> None:
        self._store, self._sequences_per_slice, self._metadata = store, sequences_per_slice, metadata
        self._waiting: dict[tuple[Split, int], _Waiting] = {}
        self._written: dict[tuple[bool, int], Spool[CorpusSlice]] = {}

    def add(self, document: ScreenedDocument, sequences: Iterable[TokenSequence]) -> None:
        """Add the sequences of a document, which may span two slices. Raises StorageFull, PartConflict."""
        place = (document.split, document.fold)
        waiting = self._waiting.setdefault(place, _Waiting(cutter=SliceCutter(max_length=self._sequences_per_slice)))
        for sequence in sequences:
            waiting.sequences.append(sequence)
            waiting.num_bytes_text.append(0 if sequence.start else document.num_bytes)
            if length := waiting.cutter.add(sequence.sequence_id):
                self._write(place, length)

    def finish(self) -> Spool[CorpusSlice]:
        """Write the remaining sequences; all slices: train by fold, then test, each in the order of writing."""
        for place, waiting in self._waiting.items():
            if waiting.sequences:
                self._write(place, len(waiting.sequences))
        in_order = (part for place in sorted(self._written) for part in self._written[place])
        return Spool(CorpusSlice, in_order)

    def _write(self, place: tuple[Split, int], length: int) -> None:
        (split, fold), waiting = place, self._waiting[place]
        sequences, num_bytes_text = waiting.sequences[:length], waiting.num_bytes_text[:length]
        content = encode_slice(sequences, metadata={**self._metadata, "split": split, "fold": fold})
        digest = sha256_hex(content)
        part = CorpusSlice(
            path=f"sequences/{split}-{'all' if fold < 0 else fold}-{digest[:16]}.parquet",
            split=split,
            fold=fold,
            sha256=digest,
            num_documents=sum(sequence.start == 0 for sequence in sequences),
            num_sequences=length,
            num_labels=sum(sequence.num_labels for sequence in sequences),
            num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
            num_bytes_text=sum(num_bytes_text),
        )
        self._store.put_once(part.path, content)
        self._written.setdefault((split == "test", fold), Spool(CorpusSlice)).append(part)
        del waiting.sequences[:length], waiting.num_bytes_text[:length]
