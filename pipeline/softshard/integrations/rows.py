"""Decoded rows as plain columns, and the collator that makes batches of them.

In: the targets of a run. Out: a mapping per sequence, for `datasets.Dataset.from_generator`, which makes a map-style
data set of them; and, from such rows in any order, the features of a batch. The loader of the rows shards them over
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softshard.data.batch import collate_mixed
from softshard.data.mixing import LabelWeights, MixedRow, Mixing
from softshard.data.target_set import RowGroupRows, SetReader, TargetSet
from softshard.shard.schema import SCHEMA_VERSION

__all__ = ["SoftLabelCollator", "mixed_in_order", "target_rows"]


def target_rows(
    targets: TargetSet,
    *,
    alpha: float,
    truncated: Literal["ghost", "renormalise"] = "ghost",
    temperature: float = 1.0,
    weights: LabelWeights | None = None,
    draw: int = 0,
) -> Iterator[dict[str, Any]]:
    """Sequences with their targets, in the order of the parts.

    Columns: `input_ids` [L]; `first_label`, or of parts of version 2 `label_runs`, which say as in a part which tokens
    are labels; for P labels `entry_counts` [P] and their `entry_ids`, `entry_weights` [E], the label's own token first
    where `own_token`; `tail_mass` [P] where there is a ghost token; `position_weights` [P] where they are not all 1,
    and `counted` [P] where groups have weights.

    Args:
        targets: one split of a run's targets.
        alpha, truncated, temperature: as in `Mixing`.
        weights: of labels in the loss; None: all are 1.
        draw: which of the independent tails, as in `entries_of`.

    Raises:
        CorpusEmpty, FilterMatchesNothing, PartCorrupt: as `SoftLabelDataset`.
    """
    mixing = Mixing(alpha=alpha, truncated=truncated, temperature=temperature, weights=weights or LabelWeights())
    reader = SetReader(targets, mixing)
    to_the_end = reader.metadata.schema_version == SCHEMA_VERSION
    for row in mixed_in_order(reader, draw=draw):
        columns = {
            "input_ids": row.token_ids,
            "first_label": int(row.positions[0]) + 1 if to_the_end else None,
            "label_runs": None if to_the_end else _runs(row),
            "own_token": alpha > 0,
            "entry_counts": row.counts,
            "entry_ids": row.entry_ids,
            "entry_weights": row.entry_weights,
            "tail_mass": row.tail_mass,
            "position_weights": row.position_weights,
            "counted": row.counted,
        }
        yield {name: value for name, value in columns.items() if value is not None}


def mixed_in_order(reader: SetReader, *, draw: int = 0) -> Iterator[MixedRow]:
    """Rows that pass the set's filter, in the order of the parts."""
    index = reader.index
    row_groups = [
        RowGroupRows(part, group, first + np.flatnonzero(index.passing[first:last]))
        for part, groups in enumerate(index.groups)
        for group, (first, last) in enumerate(groups)
    ]
    for rows in reader.read_row_groups(row_groups, draw=draw):
        yield from (rows[number] for number in sorted(rows))


class SoftLabelCollator:
    """A collator for Trainer: rows of `target_rows`, from any data set, to the features of a batch.

    Args:
        packing: one row of tokens per batch, without padding; else padded on the right with 0.
    """

    def __init__(self, *, packing: bool = False) -> None:
        self._packing = packing

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arguments for a model of `accept_targets`. Rows may differ in alpha, kind and weights.

        Raises:
            ValueError: some rows have a ghost token and others none.
        """
        mixed = [
            MixedRow(
                _positions(row),
                np.asarray(row["input_ids"], dtype=np.int32),
                np.asarray(row["entry_counts"], dtype=np.int64),
                np.asarray(row["entry_ids"], dtype=np.int32),
                np.asarray(row["entry_weights"], dtype=np.float32),
                _floats(row, "tail_mass"),
                _floats(row, "position_weights"),
                _floats(row, "counted"),
            )
            for row in features
        ]
        own_token = [bool(row["own_token"]) for row in features]
        return collate_mixed(mixed, packing=self._packing, own_token=own_token).features()


def _runs(row: MixedRow) -> NDArray[np.int32]:
    """Lengths of the runs of context and labels, by turns; they end with the sequence."""
    is_label = np.zeros(len(row.token_ids), dtype=np.int8)
    is_label[row.positions + 1] = 1
    return np.diff(np.flatnonzero(np.diff(is_label, prepend=1, append=2))).astype(np.int32)


def _positions(row: Mapping[str, Any]) -> NDArray[np.int64]:
    if row.get("label_runs") is None:
        return np.arange(int(row["first_label"]) - 1, len(row["input_ids"]) - 1)
    runs = np.asarray(row["label_runs"])
    return np.flatnonzero(np.repeat(np.arange(len(runs)) % 2, runs)) - 1


def _floats(row: Mapping[str, Any], name: str) -> NDArray[np.float32] | None:
    return None if row.get(name) is None else np.asarray(row[name], dtype=np.float32)
