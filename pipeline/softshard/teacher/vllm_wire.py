"""The wire format of targets between vLLM's process and softshard: one flat tensor of 32-bit words per sequence.

In: the targets of a sequence's labels, a chunk at a time. Out: the same targets, joined. The tensor is a chain of
records, each with its own lengths, so that a sequence that the engine takes in several pieces is only a longer chain.
Every number keeps its bits: floats are viewed as int32 and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.errors import LogitsInvalid
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.join import concatenate
from softshard.sketch.types import SequenceTargets

__all__ = ["pack_invalid", "pack_targets", "unpack"]

_TARGETS, _INVALID = 1, 2
_HEADER_WORDS = 6
_SUMS = [field.name for field in fields(FidelitySums)]
_COUNTS = {field.name for field in fields(FidelitySums) if isinstance(field.default, int)}
_FLOATS = {"label_logprob", "entropy", "tail_mass", "head_logprobs"}


def _layout(labels: int, draws: int, heads: int, tails: int) -> dict[str, int]:
    """Words of each array of a record, in order."""
    return {
        "label_logprob": labels,
        "entropy": labels,
        "tail_mass": labels,
        "head_count": labels,
        "tail_count": draws * labels,
        "head_ids": heads,
        "head_logprobs": heads,
        "tail_ids": tails,
    }


def pack_targets(targets: SequenceTargets, sums: FidelitySums, *, setting: int) -> Tensor:
    """[words] int32 record of the targets of some labels; `setting` is the index of their sketch settings."""
    lengths = targets.num_labels, targets.draws, len(targets.head_ids), len(targets.tail_ids)
    header = np.array([_TARGETS, setting, *lengths], dtype=np.int32)
    measured = np.array([getattr(sums, name) for name in _SUMS], dtype=np.float64)
    arrays = [np.ascontiguousarray(getattr(targets, name)).view(np.int32) for name in _layout(*lengths)]
    return torch.from_numpy(np.concatenate([header, measured.view(np.int32), *arrays]))


def pack_invalid(*, position: int, value: float, setting: int) -> Tensor:
    """[words] int32 record which states that the logits of a position are not finite."""
    bits = int(np.array(value, dtype=np.float32).view(np.int32))
    return torch.tensor([_INVALID, setting, position, bits, 0, 0], dtype=torch.int32)


def unpack(chain: Tensor, *, sequence_id: str, num_settings: int) -> list[tuple[SequenceTargets, FidelitySums]]:
    """Targets of a sequence with each of its settings, from the chain of its records.

    Args:
        chain: [words] int32.
        sequence_id: for the error.
        num_settings: number of sketch settings that the sequence was sketched with.

    Raises:
        LogitsInvalid: a record states that logits are not finite.
    """
    words: NDArray[np.int32] = chain.numpy()
    pieces: list[list[SequenceTargets]] = [[] for _ in range(num_settings)]
    totals = [FidelitySums() for _ in range(num_settings)]
    for setting, targets, sums in _records(words, sequence_id):
        pieces[setting].append(targets)
        totals[setting] += sums
    return [(concatenate(piece), total) for piece, total in zip(pieces, totals, strict=True)]


def _records(words: NDArray[np.int32], sequence_id: str) -> Iterator[tuple[int, SequenceTargets, FidelitySums]]:
    at = 0
    while at < len(words):
        kind, setting, *lengths = (int(word) for word in words[at : at + _HEADER_WORDS])
        if kind == _INVALID:
            value = float(words[at + 3 : at + 4].view(np.float32)[0])
            raise LogitsInvalid(sequence_id=sequence_id, position=lengths[0], value=value)
        assert kind == _TARGETS, f"record of kind {kind}"
        at += _HEADER_WORDS
        sums, at = _sums(words, at)
        layout = _layout(*lengths)
        ends = at + np.cumsum([0, *layout.values()])
        arrays = {name: words[ends[place] : ends[place + 1]] for place, name in enumerate(layout)}
        yield setting, _targets(arrays), sums
        at = int(ends[-1])


def _sums(words: NDArray[np.int32], at: int) -> tuple[FidelitySums, int]:
    end = at + 2 * len(_SUMS)
    values: Sequence[float] = words[at:end].copy().view(np.float64).tolist()
    named: dict[str, Any] = dict(zip(_SUMS, values, strict=True))
    return FidelitySums(**named | {name: int(named[name]) for name in _COUNTS}), end


def _targets(arrays: dict[str, NDArray[np.int32]]) -> SequenceTargets:
    typed: dict[str, Any] = {
        name: words.view(np.float32) if name in _FLOATS else words for name, words in arrays.items()
    }
    return SequenceTargets(**typed)
