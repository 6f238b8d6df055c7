"""Which tokens of stored sequences are labels: the column that says so, in each version of the schema.

Version 1 has `first_label`: the labels run from there to the end of the sequence. Version 2 has `label_runs`: lengths
of runs of context and of labels, by turns, which begin with context and end with the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softshard.shard.schema import LABEL_COLUMNS, PART_SCHEMAS, RUNS_VERSION, SCHEMA_VERSION
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.entries import ranges_from
from softshard.sketch.types import TokenSequence

__all__ = ["LabelRuns", "count_labels", "encode_labels", "label_runs", "needed_version", "num_tokens"]


def label_runs(sequence: TokenSequence) -> list[int]:
    """Lengths of the runs of context and of labels, by turns; none is empty, and spans that touch are one run."""
    bounds = [0, *itertools.chain(*sequence.label_spans), len(sequence.token_ids)]
    runs = [stop - start for start, stop in itertools.pairwise(bounds)]
    if not runs[-1]:
        runs.pop()
    for place in range(len(runs) - 2, 1, -1):
        if not runs[place]:
            runs[place - 1 : place + 2] = [runs[place - 1] + runs[place + 1]]
    return runs


def needed_version(sequences: Iterable[TokenSequence]) -> int:
    """The lowest version of the schema that can hold some sequences."""
    to_the_end = all(len(label_runs(sequence)) == 2 for sequence in sequences)
    return SCHEMA_VERSION if to_the_end else RUNS_VERSION


def encode_labels(sequences: Sequence[TokenSequence], *, version: int) -> pa.Array:
    """The column of a version, one value per sequence.

    Raises:
        ValueError: the labels of a sequence do not run to its end, which version 1 cannot hold.
    """
    runs = [label_runs(sequence) for sequence in sequences]
    kind = PART_SCHEMAS[version].field(LABEL_COLUMNS[version]).type
    if version == RUNS_VERSION:
        return pa.array(runs, kind)
    for sequence, own in zip(sequences, runs, strict=True):
        if len(own) != 2:
            problem = f"its labels are {sequence.label_spans} of {len(sequence.token_ids)} tokens"
            raise ValueError(f"sequence {sequence.sequence_id}: {problem}, which needs schema version {RUNS_VERSION}")
    return pa.array([own[0] for own in runs], kind)


def num_tokens(table: pa.Table) -> NDArray[np.int64]:
    """[R] tokens of each row, from the small columns `entropy` and that of the labels."""
    if LABEL_COLUMNS[RUNS_VERSION] in table.column_names:
        return _read_lists(table[LABEL_COLUMNS[RUNS_VERSION]].combine_chunks()).num_tokens
    labels = table["entropy"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    total: NDArray[np.int64] = labels.astype(np.int64) + table[LABEL_COLUMNS[SCHEMA_VERSION]].to_numpy()
    return total


def count_labels(table: pa.Table, *, num_tokens: int) -> int:
    """Labels of all rows of a table, from the column of the labels and the tokens of all rows."""
    if LABEL_COLUMNS[RUNS_VERSION] in table.column_names:
        return int(_read_lists(table[LABEL_COLUMNS[RUNS_VERSION]].combine_chunks()).num_labels.sum())
    return num_tokens - int(table[LABEL_COLUMNS[SCHEMA_VERSION]].to_numpy().sum())


@dataclass(frozen=True, slots=True)
class LabelRuns:
    """Runs of context and of labels of R sequences, one sequence after another; each begins with context."""

    lengths: NDArray[np.int64]
    """[N]"""
    counts: NDArray[np.int64]
    """[R] runs of each sequence."""

    @classmethod
    def read(cls, batch: pa.RecordBatch, *, lengths: NDArray[np.int64]) -> LabelRuns:
        """Of the rows of a batch with a column of any version; `lengths` [R] are the tokens of each row."""
        if LABEL_COLUMNS[RUNS_VERSION] in batch.schema.names:
            return _read_lists(batch.column(LABEL_COLUMNS[RUNS_VERSION]))
        firsts = batch.column(LABEL_COLUMNS[SCHEMA_VERSION]).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(np.stack([firsts, lengths - firsts], axis=1).ravel(), np.full(len(firsts), 2))

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[R] tokens of each sequence."""
        return self._sums(self.lengths)

    @property
    def num_labels(self) -> NDArray[np.int64]:
        """[R] labels of each sequence."""
        return self._sums(np.where(self._are_labels, self.lengths, 0))

    @property
    def label_indices(self) -> NDArray[np.int64]:
        """[P] indices of all labels in the tokens of all sequences, rising."""
        chosen = self._are_labels
        return ranges_from(counts_to_offsets(self.lengths)[:-1][chosen], self.lengths[chosen])

    @property
    def spans(self) -> list[tuple[tuple[int, int], ...]]:
        """[R] `label_spans` of each sequence."""
        stops = np.cumsum(self.lengths) - np.repeat(counts_to_offsets(self.num_tokens)[:-1], self.counts)
        chosen = self._are_labels
        pairs = list(zip((stops - self.lengths)[chosen].tolist(), stops[chosen].tolist(), strict=True))
        bounds = counts_to_offsets(self.counts // 2).tolist()
        return [tuple(pairs[start:stop]) for start, stop in itertools.pairwise(bounds)]

    def misfits(self, *, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[R] sequences without a label, with an empty run, or with runs that are not their `lengths` tokens."""
        empty = self._sums((self.lengths < 1).astype(np.int64)) > 0
        misfits: NDArray[np.bool_] = empty | (self.counts < 2) | (self.num_tokens != lengths)
        return misfits

    @property
    def _are_labels(self) -> NDArray[np.bool_]:
        """[N]"""
        firsts = np.repeat(counts_to_offsets(self.counts)[:-1], self.counts)
        odd: NDArray[np.bool_] = (np.arange(len(self.lengths)) - firsts) % 2 == 1
        return odd

    def _sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """[R] sums of values [N] over the runs of each sequence."""
        offsets = counts_to_offsets(self.counts)
        sums: NDArray[np.int64] = np.diff(counts_to_offsets(values)[offsets])
        return sums


def _read_lists(column: pa.ListArray) -> LabelRuns:
    lengths = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return LabelRuns(lengths, column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
