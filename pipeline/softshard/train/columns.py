"""Decoded rows as plain columns, and the collator that makes batches of them.

In: the targets of a run. Out: a mapping a sequence, which `datasets.Dataset.from_generator` makes a map-style data set
of; and, from such rows in any order, the features of a batch. Whoever loads rows deals them to ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softshard.train.batch import collate_mixed
from softshard.train.mixed import LabelWeights, MixedRow, Mixing
from softshard.train.reading import SetReader, TargetSet

__all__ = ["SoftLabelCollator", "axolotl_rows", "target_rows"]

_NO_LOGPROB = -1e9
"""What axolotl's collator puts where there is no entry."""


def target_rows(
    targets: TargetSet,
    *,
    alpha: float,
    truncated: Literal["ghost", "renormalise"] = "ghost",
    temperature: float = 1.0,
    weights: LabelWeights | None = None,
    draw: int = 0,
) -> Iterator[dict[str, Any]]:
    """Sequences with their targets, in the order of the parts; arguments as in `collate`.

    `input_ids` [L]; `first_label`; of P labels `entry_counts` [P] and their `entry_ids`, `entry_weights` [E], the
    label's own token first where `own_token`; `tail_mass` [P] where there is a ghost token; `position_weights` [P]
    where they are not all 1, and `counted` [P] where groups have weights.

    Raises:
        CorpusEmpty, NothingPasses, PartCorrupt: as `SoftLabelDataset`.
    """
    mixing = Mixing(alpha=alpha, truncated=truncated, temperature=temperature, weights=weights or LabelWeights())
    for row in _mixed(SetReader(targets, mixing), draw=draw):
        columns = {
            "input_ids": row.token_ids,
            "first_label": row.first_label,
            "own_token": alpha > 0,
            "entry_counts": row.counts,
            "entry_ids": row.entry_ids,
            "entry_weights": row.entry_weights,
            "tail_mass": row.tail_mass,
            "position_weights": row.position_weights,
            "counted": row.counted,
        }
        yield {name: value for name, value in columns.items() if value is not None}


def _mixed(reader: SetReader, *, draw: int = 0) -> Iterator[MixedRow]:
    index = reader.index
    arrivals = [
        (part, group, first + np.flatnonzero(index.passing[first:last]))
        for part, groups in enumerate(index.groups)
        for group, (first, last) in enumerate(groups)
    ]
    for arrived in reader.arriving(arrivals, draw=draw):
        yield from (arrived[number] for number in sorted(arrived))


class SoftLabelCollator:
    """Rows as `target_rows` gives them, out of any data set, to the features of a batch: a collator for Trainer.

    Args:
        packing: one row of tokens a batch, without padding; else padded on the right with 0.
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
                int(row["first_label"]),
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


def _floats(row: Mapping[str, Any], name: str) -> NDArray[np.float32] | None:
    return None if row.get(name) is None else np.asarray(row[name], dtype=np.float32)


def axolotl_rows(targets: TargetSet) -> Iterator[dict[str, Any]]:
    """Sequences in the layout that the collator of axolotl's kd plugin pads: entries a list of lists a token.

    `input_ids`, `attention_mask`, `labels` [L]; `target_token_ids`, `target_logprobs`, `target_mask` [L][k], where
    index t is the target after token t, as that plugin's loss compares them since axolotl 0.10 (releases before it took
    index t for the target of token t). Heads are renormalised to 1, for it knows no ghost token. Tokens without a
    target have entries whose mask is 0.

    Raises:
        ValueError: the sketch is `threshold`, whose tail is a sample: as log-probabilities that sum to 1 it is biased.
        CorpusEmpty, NothingPasses, PartCorrupt: as `SoftLabelDataset`.
    """
    reader = SetReader(targets, Mixing(alpha=0.0, truncated="renormalise"))
    if (kind := reader.metadata.kind) == "threshold":
        raise ValueError(
            f"{targets.store.uri}: the sketch is {kind}, and its sampled tail has no log-probabilities; train from it"
            " with SoftLabelCollator, or capture `topk` for axolotl"
        )
    for row in _mixed(reader):
        yield _axolotl_row(row)


def _axolotl_row(row: MixedRow) -> dict[str, Any]:
    ids, first = row.token_ids.tolist(), row.first_label
    with np.errstate(divide="ignore"):
        logprobs = np.maximum(np.log(row.entry_weights), _NO_LOGPROB)
    bounds = np.cumsum(row.counts)[:-1]
    entries = [part.tolist() for part in np.split(row.entry_ids, bounds)]
    values = [part.tolist() for part in np.split(logprobs, bounds)]
    width = int(row.counts.max())
    empty, none, before = [0] * width, [_NO_LOGPROB] * width, first - 1
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * first + ids[first:],
        "target_token_ids": [empty] * before + entries + [empty],
        "target_logprobs": [none] * before + values + [none],
        "target_mask": [empty] * before + [[1] * count for count in row.counts.tolist()] + [empty],
    }
