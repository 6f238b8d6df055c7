"""Logits to sketches: the one implementation that every engine calls.

Reads rows of logits, one per label, on any device and in any floating type. Returns the rows' targets as numpy arrays,
and the fidelity of their stored form. After one pass over the logits, only single blocks of them are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.config import SketchSettings
from softshard.errors import LogitsInvalid
from softshard.sketch.blocks import BlockedRows
from softshard.sketch.codec import LOWEST_LOGPROB, head_steps, head_weights, to_mass_grid
from softshard.sketch.dense import DenseSums, sum_rows
from softshard.sketch.entries import Entries, entries_of
from softshard.sketch.fidelity import FidelitySums, StoredLabels, mass_by_rank, measure
from softshard.sketch.selection import Selection, sample_tail, threshold_head
from softshard.sketch.types import SequenceTargets

__all__ = ["sketch_rows", "stored_entries"]

_RANKED_SHARE = 1 / 256
"""Share of labels whose mass by rank is measured: a partial sort costs ten times as much as everything else."""


@torch.inference_mode()
def sketch_rows(
    logits: Tensor,
    *,
    labels: Tensor,
    uniforms: NDArray[np.float64],
    settings: SketchSettings,
    vocab_size: int,
    places: Sequence[tuple[str, int]],
    temperature: float = 1.0,
) -> tuple[SequenceTargets, FidelitySums]:
    """Sketch the targets that rows of logits give.

    Args:
        logits: [rows, at least vocab_size].
        labels: [rows] int64, ids of the labels.
        uniforms: [draws, rows] of `philox.draw_uniforms`, one draw for each independent tail.
        settings: kind of sketch, and the step in which the head is stored.
        vocab_size: tokens of the vocabulary.
        places: [rows] sequence id and position of each row, for the error.
        temperature: logits are divided by it. `settings.temperature` is not read: callers pass it here, or have applied
            it already.

    Raises:
        LogitsInvalid: a row has NaN or +inf, or only -inf.
    """
    rows = BlockedRows(logits, vocab_size=vocab_size, temperature=temperature)
    sums = sum_rows(rows, labels, settings, ranked=np.flatnonzero(uniforms[0] < _RANKED_SHARE))
    _refuse_invalid(rows, sums.log_sums, places)
    tails: list[Selection] = []
    if (tau := settings.tail_weight) is not None:
        log_sums = sums.log_sums.float()
        head = threshold_head(rows, sums.block_sums, log_sums=log_sums, tau=tau)
        noise = torch.from_numpy(uniforms).to(logits.device)
        tails = [sample_tail(rows, sums.block_sums, draw, log_sums=log_sums, tau=tau) for draw in noise]
    else:
        assert sums.head is not None
        head = sums.head
    targets = _targets(rows, sums, head, tails, draws=len(uniforms))
    fidelity = measure(
        _stored(targets, head, tails, settings),
        square_sums=sums.square_sums.cpu().numpy(),
        vocab_size=vocab_size,
        covers_all=settings.covers_vocabulary,
    )
    return targets, fidelity + mass_by_rank(sums.most_likely)


def _refuse_invalid(rows: BlockedRows, log_sums: Tensor, places: Sequence[tuple[str, int]]) -> None:
    bad = torch.nonzero(~torch.isfinite(log_sums))
    if len(bad):
        row = int(bad[0, 0])
        sequence_id, position = places[row]
        highest = float(rows.scores(slice(row, row + 1)).max())
        raise LogitsInvalid(sequence_id=sequence_id, position=position, value=highest)


def _targets(
    rows: BlockedRows, sums: DenseSums, head: Selection, tails: Sequence[Selection], *, draws: int
) -> SequenceTargets:
    head_count = torch.bincount(head.rows, minlength=rows.num_rows)
    tail_mass = sums.block_sums.sum(1).clamp(max=1.0)
    tail_mass[head_count == 0] = 1.0
    tail_counts = [torch.bincount(tail.rows, minlength=rows.num_rows) for tail in tails]
    return SequenceTargets(
        label_logprob=np.maximum(_float32(sums.label_logprob), np.float32(LOWEST_LOGPROB)),
        entropy=_float32(sums.entropy),
        tail_mass=_float32(tail_mass),
        head_count=_int32(head_count),
        tail_count=_int32(torch.cat(tail_counts)) if tails else np.zeros(draws * rows.num_rows, np.int32),
        head_ids=_int32(head.ids),
        head_logprobs=np.clip(_float32(head.probabilities.log()), LOWEST_LOGPROB, 0),
        tail_ids=_int32(torch.cat([tail.ids for tail in tails])) if tails else np.zeros(0, np.int32),
    )


def _float32(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _float64(values: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.double().cpu().numpy()
    return array


def _int32(values: Tensor) -> NDArray[np.int32]:
    array: NDArray[np.int32] = values.to(torch.int32).cpu().numpy()
    return array


def _stored(
    targets: SequenceTargets, head: Selection, tails: Sequence[Selection], settings: SketchSettings
) -> StoredLabels:
    """The first draw as a reader decodes it."""
    steps = head_steps(targets.head_logprobs, targets.head_count, step=settings.step)
    tau = settings.tail_weight
    mass = 1 - to_mass_grid(targets.tail_mass, tau=tau)
    return StoredLabels(
        head_count=targets.head_count,
        head_weights=head_weights(steps * -settings.step, targets.head_count, mass),
        head_probabilities=_float64(head.probabilities),
        tail_count=targets.tail_count[: targets.num_labels],
        tail_probabilities=_float64(tails[0].probabilities) if tails else np.zeros(0),
        tau=tau or 0.0,
    )


def stored_entries(targets: SequenceTargets, settings: SketchSettings, *, draw: int = 0) -> Entries:
    """Entries as a reader of the part decodes them: rounded to steps and grids."""
    steps = head_steps(targets.head_logprobs, targets.head_count, step=settings.step)
    tau = settings.tail_weight
    stored = replace(
        targets,
        head_logprobs=(steps * -settings.step).astype(np.float32),
        tail_mass=to_mass_grid(targets.tail_mass, tau=tau),
    )
    return entries_of(stored, tau=tau, draw=draw)
