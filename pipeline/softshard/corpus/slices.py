"""Slices: Parquet files of sequences, encoded and decoded, and the writer that divides a corpus into them.

A slice has the columns of a part that are known before the teacher runs. Its metadata names the tokenizer and the
settings of the windows. With one version of pyarrow, the same sequences give the same bytes. All slices of a corpus
have one version, as readers of many files expect one schema.
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
from softshard.corpus.manifest import CORPUS_VERSION, CORPUS_VERSION_WITH_RUNS, PART_VERSIONS, CorpusSlice
from softshard.corpus.screen import ScreenedDocument, Split
from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool
from softshard.shard.files import parquet_errors
from softshard.shard.labels import LabelRuns, encode_labels, needed_version
from softshard.shard.schema import LABEL_COLUMNS, PART_SCHEMAS
from softshard.sketch.types import TokenSequence
from softshard.storage import Store

__all__ = ["SLICE_SCHEMAS", "SliceWriter", "decode_slice", "encode_slice"]

_METADATA_KEY = b"softshard-corpus"
_PLAIN = ("sequence_id", "document_id", "source", "style", "group", "start")
_ROWS_PER_GROUP = 64

SLICE_SCHEMAS = {
    version: pa.schema([PART_SCHEMAS[part].field(name) for name in (*_PLAIN, LABEL_COLUMNS[part], "token_ids")])
    for version, part in PART_VERSIONS.items()
}
"""By version of the corpus."""


def encode_slice(
    sequences: Sequence[TokenSequence], *, metadata: dict[str, str | int], version: int = CORPUS_VERSION
) -> bytes:
    """A whole slice, one row per sequence in the order given. Raises ValueError as `encode_part` does."""
    columns_of, part_version = SLICE_SCHEMAS[version], PART_VERSIONS[version]
    columns = [pa.array([getattr(s, name) for s in sequences], columns_of.field(name).type) for name in _PLAIN]
    columns.append(encode_labels(sequences, version=part_version))
    offsets = np.cumsum([0, *(len(s.token_ids) for s in sequences)], dtype=np.int32)
    flat = np.concatenate([s.token_ids for s in sequences])
    kind = columns_of.field("token_ids").type
    columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()), type=kind))
    described = json.dumps({**metadata, "schema_version": version}, sort_keys=True)
    schema = columns_of.with_metadata({_METADATA_KEY: described.encode()})
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        use_dictionary=["document_id", "source", "style", "group", "first_label"],
        column_encoding=dict.fromkeys(("token_ids.list.element", "label_runs.list.element"), "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_slice(content: bytes, *, uri: str) -> list[TokenSequence]:
    """Sequences of a slice, in their order. Raises PartCorrupt when it is not Parquet or not what a slice holds."""
    with parquet_errors(uri):
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    if table.schema.remove_metadata() not in SLICE_SCHEMAS.values():
        versions = " or ".join(map(str, SLICE_SCHEMAS))
        raise PartCorrupt(uri=uri, problem=f"its columns are not those of corpus version {versions}")
    if not table.num_rows:
        return []
    (batch,) = table.combine_chunks().to_batches()
    column = batch.column("token_ids")
    lengths = column.value_lengths().to_numpy().astype(np.int64)
    runs = LabelRuns.read(batch, lengths=lengths)
    if (misfits := runs.misfits(lengths=lengths)).any():
        sequence_id = batch.column("sequence_id")[int(np.argmax(misfits))].as_py()
        raise PartCorrupt(uri=uri, problem=f"sequence {sequence_id}: its runs of labels do not match its tokens")
    token_ids = np.split(column.flatten().to_numpy(), np.cumsum(lengths)[:-1])
    rows = zip(batch.select(list(_PLAIN)).to_pylist(), token_ids, runs.spans, strict=True)
    return [TokenSequence(**row, token_ids=ids, label_spans=spans) for row, ids, spans in rows]


@dataclass(slots=True)
class _Waiting:
    """Sequences of one split and fold that are not written yet."""

    cutter: SliceCutter
    sequences: list[TokenSequence] = field(default_factory=list)
    num_bytes_text: list[int] = field(default_factory=list)
    """For each sequence: bytes of the document that starts with it, or 0."""


class SliceWriter:
    """Writes sequences in slices by split and fold, cut by `SliceCutter`.

    Of each split and fold, at most the sequences of one slice are in memory. From the first sequence on whose labels do
    not run to its end, slices are written in the version that can hold it; `finish` writes those before it again.
    """

    def __init__(self, store: Store, *, sequences_per_slice: int, metadata: dict[str, str | int]) -> None:
        self._store, self._sequences_per_slice, self._metadata = store, sequences_per_slice, metadata
        self._waiting: dict[tuple[Split, int], _Waiting] = {}
        self._written: dict[tuple[bool, int], Spool[CorpusSlice]] = {}
        self._there = frozenset(store.list("sequences"))
        self._outdated: set[str] = set()
        self.version = CORPUS_VERSION
        """Of all slices, once `finish` has returned."""

    def add(self, document: ScreenedDocument, sequences: Iterable[TokenSequence]) -> None:
        """Add the sequences of a document, which may span two slices. Raises StorageFull, PartConflict."""
        place = (document.split, document.fold)
        waiting = self._waiting.setdefault(place, _Waiting(cutter=SliceCutter(max_length=self._sequences_per_slice)))
        for sequence in sequences:
            if self.version == CORPUS_VERSION and needed_version([sequence]) != PART_VERSIONS[CORPUS_VERSION]:
                self.version = CORPUS_VERSION_WITH_RUNS
                self._outdated = {part.path for parts in self._written.values() for part in parts}
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
        return Spool(CorpusSlice, map(self._renewed, in_order))

    def _write(self, place: tuple[Split, int], length: int) -> None:
        (split, fold), waiting = place, self._waiting[place]
        sequences, num_bytes_text = waiting.sequences[:length], waiting.num_bytes_text[:length]
        path, digest = self._put(sequences, split, fold)
        part = CorpusSlice(
            path=path,
            split=split,
            fold=fold,
            sha256=digest,
            num_documents=sum(sequence.start == 0 for sequence in sequences),
            num_sequences=length,
            num_labels=sum(sequence.num_labels for sequence in sequences),
            num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
            num_bytes_text=sum(num_bytes_text),
        )
        self._written.setdefault((split == "test", fold), Spool(CorpusSlice)).append(part)
        del waiting.sequences[:length], waiting.num_bytes_text[:length]

    def _put(self, sequences: Sequence[TokenSequence], split: Split, fold: int) -> tuple[str, str]:
        """Write a slice; its path and its SHA-256."""
        metadata = {**self._metadata, "split": split, "fold": fold}
        content = encode_slice(sequences, metadata=metadata, version=self.version)
        digest = sha256_hex(content)
        path = f"sequences/{split}-{'all' if fold < 0 else fold}-{digest[:16]}.parquet"
        self._store.put_once(path, content)
        return path, digest

    def _renewed(self, part: CorpusSlice) -> CorpusSlice:
        """A slice in the version of all; the file of an outdated one is removed unless it was there before."""
        if part.path not in self._outdated:
            return part
        sequences = decode_slice(self._store.read(part.path), uri=f"{self._store.uri}/{part.path}")
        path, digest = self._put(sequences, part.split, part.fold)
        if part.path not in self._there:
            self._store.remove(part.path)
        return part.model_copy(update={"path": path, "sha256": digest})
