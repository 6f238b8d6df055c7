"""Logits to sketches: the one implementation that every engine calls.

In: rows of logits, one a label, on any device and in any floating type. Out: the rows' targets as numpy arrays, and how
faithful their stored form is. Logits beyond the vocabulary are padding and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.config import SketchSettings, ThresholdSketch
from softshard.errors import LogitsInvalid
from softshard.target.codec import decode_head, encode_head, offsets_of, to_mass_grid
from softshard.target.entries import Entries, entries_of
from softshard.target.fidelity import FidelitySums, measure
from softshard.target.select import BLOCK, Selection, block_sums, sample_tail, select_head
from softshard.target.types import SequenceTargets

__all__ = ["concatenate", "sketch_rows", "split_rows", "stored_entries"]

_ROWS_ON_CPU = 16
"""Rows that are reduced at a time: two float32 copies of them stay in a core's cache at V = 49,152."""
_ROWS_ON_GPU = 1024


def sketch_rows(
    logits: Tensor,
    *,
    labels: Tensor,
    uniforms: NDArray[np.float64],
    settings: SketchSettings,
    vocab_size: int,
    places: Sequence[tuple[str, int]],
) -> tuple[SequenceTargets, FidelitySums]:
    """Sketch the targets that some rows of logits stand for.

    Args:
        logits: [rows, at least vocab_size]; temperature, if any, is already in them.
        labels: [rows] int64, ids of the labels.
        uniforms: [rows] of `philox.label_uniforms`.
        settings: kind of sketch, and the step with which it will be stored.
        vocab_size: tokens of the vocabulary.
        places: [rows] sequence id and position of each row, for the error.

    Raises:
        LogitsInvalid: a row has NaN or +inf, or nothing but -inf.
    """
    size = _ROWS_ON_CPU if logits.device.type == "cpu" else _ROWS_ON_GPU
    noise = torch.from_numpy(uniforms).to(logits.device)
    chunks = []
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        scores = logits[rows, :vocab_size].float()
        highest = scores.amax(1, keepdim=True)
        _refuse_invalid(highest, places[rows])
        chunks.append(_reduce(scores, highest, labels[rows], noise[rows], settings))
    targets = concatenate([chunk.targets for chunk in chunks])
    fidelity = measure(
        stored_entries(targets, settings),
        np.concatenate([chunk.entry_probabilities for chunk in chunks]),
        square_sums=np.concatenate([chunk.square_sums for chunk in chunks]),
        vocab_size=vocab_size,
        covers_all=settings.kind == "full",
    )
    return targets, fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reduced:
    """What is left of some rows once the dense distribution is gone."""

    targets: SequenceTargets
    entry_probabilities: NDArray[np.float64]
    square_sums: NDArray[np.float64]


def _reduce(scores: Tensor, highest: Tensor, labels: Tensor, noise: Tensor, settings: SketchSettings) -> _Reduced:
    vocab_size = scores.shape[1]
    finite = scores.clamp(min=torch.finfo(torch.float32).min / 4)
    probabilities = torch.softmax(finite, 1)
    log_sum = highest[:, 0] - probabilities.amax(1).log()
    entropy = log_sum - torch.linalg.vecdot(probabilities, finite)
    square_sums = torch.linalg.vecdot(probabilities, probabilities)
    label_logprob = scores.gather(1, labels[:, None])[:, 0] - log_sum

    if padded := -vocab_size % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, padded))
    head = select_head(probabilities, settings, vocab_size=vocab_size)
    head_logprobs = finite[head.rows, head.ids] - log_sum[head.rows]
    probabilities[head.rows, head.ids] = 0
    sums = block_sums(probabilities)
    if isinstance(settings, ThresholdSketch):
        tail = sample_tail(probabilities, sums, noise, tau=settings.tau)
    else:
        tail = Selection(rows=head.rows[:0], ids=head.ids[:0], probabilities=head.probabilities[:0])
    head_count, tail_count = (torch.bincount(part.rows, minlength=len(scores)) for part in (head, tail))
    tail_mass = sums[:, -1].clamp(max=1.0)
    tail_mass[head_count == 0] = 1.0
    targets = SequenceTargets(
        label_logprob=_float32(label_logprob),
        entropy=_float32(entropy.clamp(min=0)),
        tail_mass=_float32(tail_mass),
        head_count=_int32(head_count),
        tail_count=_int32(tail_count),
        head_ids=_int32(head.ids),
        head_logprobs=np.minimum(_float32(head_logprobs), 0),
        tail_ids=_int32(tail.ids),
    )
    return _Reduced(
        targets=targets,
        entry_probabilities=_in_entry_order(head, tail),
        square_sums=square_sums.double().cpu().numpy(),
    )


def _refuse_invalid(highest: Tensor, places: Sequence[tuple[str, int]]) -> None:
    bad = torch.nonzero(~torch.isfinite(highest[:, 0]))
    if len(bad):
        row = int(bad[0, 0])
        sequence_id, position = places[row]
        raise LogitsInvalid(sequence_id=sequence_id, position=position, value=float(highest[row, 0]))


def _float32(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _int32(values: Tensor) -> NDArray[np.int32]:
    array: NDArray[np.int32] = values.to(torch.int32).cpu().numpy()
    return array


def _in_entry_order(head: Selection, tail: Selection) -> NDArray[np.float64]:
    """Probabilities of head and tail entries, row by row, the head first: the order of `Entries`."""
    rows = torch.cat([head.rows, tail.rows])
    values: NDArray[np.float64] = torch.cat([head.probabilities, tail.probabilities]).double().cpu().numpy()
    ordered: NDArray[np.float64] = values[torch.argsort(rows, stable=True).cpu().numpy()]
    return ordered


def stored_entries(targets: SequenceTargets, settings: SketchSettings) -> Entries:
    """Entries as a reader of the part will see them: after steps and grids."""
    steps = decode_head(encode_head(targets.head_logprobs, targets.head_count, step=settings.step), targets.head_count)
    values = {field.name: getattr(targets, field.name) for field in fields(targets)}
    values["head_logprobs"] = (steps * -settings.step).astype(np.float32)
    values["tail_mass"] = to_mass_grid(targets.tail_mass)
    tau = settings.tau if isinstance(settings, ThresholdSketch) else None
    return entries_of(SequenceTargets(**values), step=settings.step, tau=tau)


def concatenate(parts: Sequence[SequenceTargets]) -> SequenceTargets:
    """Targets of some labels, and then of some more."""
    return SequenceTargets(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(SequenceTargets)
        }
    )


def split_rows(targets: SequenceTargets, num_labels: Sequence[int]) -> list[SequenceTargets]:
    """The inverse of `concatenate`, given the number of labels of each piece."""
    labels = offsets_of(np.array(num_labels, dtype=np.int32))
    heads = offsets_of(targets.head_count)[labels]
    tails = offsets_of(targets.tail_count)[labels]
    pieces = []
    for piece in range(len(num_labels)):
        rows, head, tail = (slice(at[piece], at[piece + 1]) for at in (labels, heads, tails))
        pieces.append(
            SequenceTargets(
                label_logprob=targets.label_logprob[rows],
                entropy=targets.entropy[rows],
                tail_mass=targets.tail_mass[rows],
                head_count=targets.head_count[rows],
                tail_count=targets.tail_count[rows],
                head_ids=targets.head_ids[head],
                head_logprobs=targets.head_logprobs[head],
                tail_ids=targets.tail_ids[tail],
            )
        )
    return pieces
