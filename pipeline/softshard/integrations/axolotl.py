"""Rows in the layout that axolotl's knowledge-distillation plugin reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from softshard.data.mixing import MixedRow, Mixing
from softshard.data.target_set import SetReader, TargetSet
from softshard.integrations.rows import mixed_in_order

__all__ = ["axolotl_rows"]

_NO_LOGPROB = -1e9
"""The value that axolotl's collator writes where there is no entry."""
_VARIABLE_HEADS = (
    "these heads have different lengths: in axolotl leave `kd_normalize_topk` unset or false, because otherwise it"
    " counts its own padding as tokens, and the loss is wrong"
)


def axolotl_rows(targets: TargetSet) -> Iterator[dict[str, Any]]:
    """Sequences in the layout that the collator of axolotl's kd plugin pads, with a list of entries per token.

    `input_ids`, `attention_mask`, `labels` [L]; `target_token_ids`, `target_logprobs`, `target_mask` [L][k]. Index t is
    the target after token t, as the plugin's loss expects since axolotl 0.10 (in earlier releases index t was the
    target of token t). Heads are renormalised to 1, because the plugin has no ghost token. Tokens without a target have
    entries with mask 0.

    With `kd_normalize_topk: true` the plugin renormalises the student too, over all k entries that its collator pads
    to, and counts the padding as tokens of id 0. So heads of different lengths, those of `nucleus`, need it unset or
    false; a warning says so.

    Raises:
        ValueError: the sketch is `threshold`: its tail is a sample, and biased as log-probabilities that sum to 1.
        CorpusEmpty, FilterMatchesNothing, PartCorrupt: as `SoftLabelDataset`.
    """
    reader = SetReader(targets, Mixing(alpha=0.0, truncated="renormalise"))
    if reader.metadata.sketch_class.samples_tail:
        raise ValueError(
            f"{targets.store.uri}: the sketch is {reader.metadata.kind}, and its sampled tail has no log-probabilities;"
            " train from it with SoftLabelCollator, or capture `topk` for axolotl"
        )
    if reader.metadata.kind == "nucleus":
        warnings.warn(_VARIABLE_HEADS, stacklevel=2)
    for row in mixed_in_order(reader):
        yield _axolotl_row(row)


def _axolotl_row(row: MixedRow) -> dict[str, Any]:
    ids = row.token_ids.tolist()
    with np.errstate(divide="ignore"):
        logprobs = np.maximum(np.log(row.entry_weights), _NO_LOGPROB)
    bounds = np.cumsum(row.counts)[:-1]
    width = int(row.counts.max())
    columns: dict[str, list[Any]] = {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * len(ids),
        "target_token_ids": [[0] * width] * len(ids),
        "target_logprobs": [[_NO_LOGPROB] * width] * len(ids),
        "target_mask": [[0] * width] * len(ids),
    }
    for position, entries, values in zip(
        row.positions.tolist(), np.split(row.entry_ids, bounds), np.split(logprobs, bounds), strict=True
    ):
        columns["labels"][position + 1] = ids[position + 1]
        columns["target_token_ids"][position] = entries.tolist()
        columns["target_logprobs"][position] = values.tolist()
        columns["target_mask"][position] = [1] * len(entries)
    return columns
