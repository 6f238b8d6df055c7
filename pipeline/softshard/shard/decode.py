"""Decodes the bytes of a part into sequences and their targets, row by row or one record batch at once.

What is decoded is consistent: lists have the lengths that they must have, tokens are in the vocabulary, no token is
twice in a tail. Everything else raises PartCorrupt, which names the part and, if a single row is wrong, its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softshard.errors import PartCorrupt
from softshard.shard.files import parquet_errors
from softshard.shard.labels import LabelRuns
from softshard.shard.schema import LABEL_COLUMNS, SCHEMA_VERSION, PartMetadata, read_metadata
from softshard.sketch.codec import counts_to_offsets, decode_head, decode_tail, ids_by_rank
from softshard.sketch.entries import ranges_from
from softshard.sketch.types import SequenceTargets, TokenSequence

__all__ = ["Block", "Decoder", "decode_part", "open_part"]

_PER_LABEL = ("label_logprob", "entropy", "tail_mass", "head_count")
_LISTS = ("token_ids", *_PER_LABEL, "tail_count", "head_ranks", "head_steps", "tail_gaps")
_SEQUENCE = ("sequence_id", "document_id", "source", "style", "group", "start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """R rows decoded together, row after row: L tokens and P labels in total, and one draw of the tails."""

    token_ids: NDArray[np.int32]
    """[L]"""
    lengths: NDArray[np.int64]
    """[R] tokens of each row."""
    label_indices: NDArray[np.int64]
    """[P] indices of the labels in token_ids, rising."""
    label_counts: NDArray[np.int64]
    """[R] labels of each row."""
    targets: SequenceTargets
    """Of P labels. Log-probabilities of labels and entropies are NaN when they were not read."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[P] ids of the labels."""
        return self.token_ids[self.label_indices]


class Decoder:
    """Decodes the record batches of one part."""

    def __init__(self, metadata: PartMetadata, *, uri: str) -> None:
        self.metadata, self._uri = metadata, uri
        frequent = np.array(metadata.frequent_ids, dtype=np.int32)
        self._by_rank = ids_by_rank(frequent, vocab_size=metadata.vocab_size)

    @staticmethod
    def columns(*, with_scores: bool, version: int = SCHEMA_VERSION) -> list[str]:
        """Columns to read for `block`; `with_scores` adds log-probabilities of labels and entropies."""
        scores = () if with_scores else ("label_logprob", "entropy")
        return [LABEL_COLUMNS[version], *(name for name in _LISTS if name not in scores)]

    def block(self, batch: pa.RecordBatch, *, draw: int = 0) -> Block:
        """Decode all rows of a record batch that has `columns`, with draw `draw` modulo the number of draws.

        Raises:
            PartCorrupt: the lists of a row are inconsistent, or a token is not in the vocabulary.
        """
        lists = self._lists(batch)
        counts, gaps = lists.select_draw(draw % self.metadata.draws)
        unknown = np.broadcast_to(np.float32(np.nan), lists.flat["head_count"].shape)
        targets = SequenceTargets(
            label_logprob=lists.flat.get("label_logprob", unknown),
            entropy=lists.flat.get("entropy", unknown),
            tail_mass=lists.flat["tail_mass"],
            head_count=lists.flat["head_count"],
            tail_count=counts,
            head_ids=self._ids(lists.flat["head_ranks"]),
            head_logprobs=self._logprobs(lists),
            tail_ids=self._ids(decode_tail(gaps, counts)),
        )
        return Block(
            token_ids=lists.flat["token_ids"],
            lengths=lists.lengths["token_ids"].astype(np.int64),
            label_indices=lists.runs.label_indices,
            label_counts=lists.runs.num_labels,
            targets=targets,
        )

    def rows(self, batch: pa.RecordBatch) -> list[tuple[TokenSequence, SequenceTargets]]:
        """Decode each row of a record batch that has all columns, with all draws. Raises PartCorrupt."""
        lists = self._lists(batch)
        decoded = {
            **{name: lists.flat[name] for name in ("token_ids", *_PER_LABEL, "tail_count")},
            "head_ids": self._ids(lists.flat["head_ranks"]),
            "head_logprobs": self._logprobs(lists),
            "tail_ids": self._ids(decode_tail(lists.flat["tail_gaps"], lists.flat["tail_count"])),
        }
        stored = {"head_ids": "head_ranks", "head_logprobs": "head_ranks", "tail_ids": "tail_gaps"}
        bounds = {name: counts_to_offsets(lists.lengths[stored.get(name, name)]).tolist() for name in decoded}
        plain = {name: batch.column(name).to_pylist() for name in _SEQUENCE}
        spans = lists.runs.spans
        rows = []
        for index in range(batch.num_rows):
            row = {name: values[bounds[name][index] : bounds[name][index + 1]] for name, values in decoded.items()}
            own: dict[str, Any] = {name: plain[name][index] for name in _SEQUENCE}
            sequence = TokenSequence(**own, token_ids=row.pop("token_ids"), label_spans=spans[index])
            rows.append((sequence, SequenceTargets(**row)))
        return rows

    def _lists(self, batch: pa.RecordBatch) -> _Lists:
        lists = _Lists.read(batch, draws=self.metadata.draws, uri=self._uri)
        tokens, size = lists.flat["token_ids"], len(self._by_rank)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            place = int(np.argmax((tokens < 0) | (tokens >= size)))
            row = int(np.searchsorted(counts_to_offsets(lists.lengths["token_ids"]), place, side="right")) - 1
            raise _make_error(batch, row, f"a token of the text is outside the vocabulary of {size}", uri=self._uri)
        return lists

    def _logprobs(self, lists: _Lists) -> NDArray[np.float32]:
        steps = decode_head(lists.flat["head_steps"], lists.flat["head_count"])
        logprobs: NDArray[np.float32] = (steps * -self.metadata.step).astype(np.float32)
        return logprobs

    def _ids(self, ranks: NDArray[np.int32]) -> NDArray[np.int32]:
        """Token ids of ranks. A running sum that overflows int32 has passed a rank that these bounds refuse."""
        if len(ranks) and not 0 <= int(ranks.min()) <= int(ranks.max()) < len(self._by_rank):
            problem = f"an entry is outside the vocabulary of {len(self._by_rank)}"
            raise PartCorrupt(uri=self._uri, problem=problem)
        # The ranks are in bounds; mode="clip" saves a second check.
        return np.take(self._by_rank, ranks, mode="clip")


def open_part(content: bytes | pa.Buffer | BinaryIO, *, uri: str) -> tuple[pq.ParquetFile, PartMetadata]:
    """Open a part and read its metadata; no row is decoded. Raises PartCorrupt."""
    with parquet_errors(uri):
        source = pa.BufferReader(content) if isinstance(content, bytes | pa.Buffer) else content
        file = pq.ParquetFile(source, page_checksum_verification=True)
    return file, read_metadata(file.schema_arrow, uri=uri)


def decode_part(
    content: bytes | pa.Buffer, *, uri: str
) -> tuple[list[tuple[TokenSequence, SequenceTargets]], PartMetadata]:
    """Decode all rows of a part, with all draws. Raises PartCorrupt."""
    file, metadata = open_part(content, uri=uri)
    with parquet_errors(uri):
        table = file.read()
    decoder = Decoder(metadata, uri=uri)
    return [row for batch in table.to_batches() for row in decoder.rows(batch)], metadata


def _make_error(batch: pa.RecordBatch, row: int | None, what: str, *, uri: str) -> PartCorrupt:
    """The error of a row of a batch; `row` is None when no single row is wrong."""
    known = "sequence_id" in batch.schema.names
    who = f"sequence {batch.column('sequence_id')[row].as_py()}: " if known and row is not None else ""
    return PartCorrupt(uri=uri, problem=who + what)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lists:
    """The list columns of a record batch as they are stored, concatenated and known to be consistent."""

    flat: dict[str, NDArray[Any]]
    lengths: dict[str, NDArray[np.int32]]
    """[R] by name."""
    runs: LabelRuns
    draws: int

    @classmethod
    def read(cls, batch: pa.RecordBatch, *, draws: int, uri: str) -> _Lists:
        names = [name for name in _LISTS if name in batch.schema.names]
        columns = {name: batch.column(name) for name in names}
        lengths = {name: column.value_lengths().to_numpy(zero_copy_only=False) for name, column in columns.items()}
        lists = cls(
            flat={name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()},
            lengths=lengths,
            runs=LabelRuns.read(batch, lengths=lengths["token_ids"].astype(np.int64)),
            draws=draws,
        )
        if (problem := lists._problem()) is not None:
            raise _make_error(batch, *problem, uri=uri)
        return lists

    def _problem(self) -> tuple[int | None, str] | None:
        """The first row with inconsistent lists, and what is wrong; the row is None when no single row is wrong."""
        flat, lengths = self.flat, self.lengths
        if (bad := self.runs.misfits(lengths=lengths["token_ids"].astype(np.int64))).any():
            return int(np.argmax(bad)), "its runs of labels do not match its tokens"
        labels = self.runs.num_labels
        for name in (*_PER_LABEL, "tail_count"):
            if name in lengths:
                wanted = labels * self.draws if name == "tail_count" else labels
                if (bad := lengths[name] != wanted).any():
                    return int(np.argmax(bad)), f"{name} does not match its tokens"
        heads, tails = flat["head_count"], flat["tail_count"]
        entries = {
            "head_ranks": (heads, "head_count"),
            "head_steps": (np.maximum(heads - 1, 0), "head_count"),
            "tail_gaps": (tails, "tail_count"),
        }
        for name, (counts, owner) in entries.items():
            bad = np.diff(counts_to_offsets(counts)[counts_to_offsets(lengths[owner])]) != lengths[name]
            if (bad := bad | (counts.min(initial=0) < 0)).any():
                return int(np.argmax(bad)), "its entries do not match their counts"
        if flat["head_steps"].min(initial=0) < 0:
            return None, "the probabilities of a head do not fall"
        gaps, firsts = flat["tail_gaps"], flat["tail_gaps"][counts_to_offsets(tails)[:-1][tails > 0]]
        if gaps.min(initial=0) < 0 or np.count_nonzero(gaps) - np.count_nonzero(firsts) < len(gaps) - len(firsts):
            return None, "a tail has a token twice"
        return None

    def select_draw(self, draw: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Counts [P] and gaps of one draw of the tails."""
        counts, gaps = self.flat["tail_count"], self.flat["tail_gaps"]
        if self.draws == 1:
            return counts, gaps
        labels = self.lengths["head_count"]
        taken = ranges_from(counts_to_offsets(self.lengths["tail_count"])[:-1] + draw * labels, labels)
        return counts[taken], gaps[ranges_from(counts_to_offsets(counts)[taken], counts[taken])]
