"""Targets as (token, weight) entries: what a loss or a metric needs of them.

In: a sequence's targets as a part holds them. Out: for each label its head entries, then its tail entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softshard.target.codec import head_weights, offsets_of
from softshard.target.types import SequenceTargets

__all__ = ["Entries", "entries_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Sparse distributions of P labels; those of label j are offsets[j]:offsets[j + 1]."""

    ids: NDArray[np.int32]
    """[E]"""
    weights: NDArray[np.float32]
    """[E]"""
    offsets: NDArray[np.int64]
    """[P + 1]"""


def entries_of(targets: SequenceTargets, *, tau: float | None, draw: int = 0, temperature: float = 1.0) -> Entries:
    """Entries whose weights sum, in expectation, to 1 (threshold), or to 1 - tail_mass (the other kinds).

    Args:
        targets: of any number of labels.
        tau: weight of a tail entry, None where the kind has none.
        draw: which of the independent tails; counted from 0, and from 0 again after the last, so an epoch will do.
        temperature: the head becomes p^(1 / temperature), of the same mass. That is the target at that temperature
            where the head is the whole vocabulary, or where what is left out is to be renormalised away.
    """
    targets = targets.of_draw(draw)
    heads = head_weights(targets.head_logprobs / temperature, targets.head_count, 1 - targets.tail_mass)
    counts = np.stack([targets.head_count, targets.tail_count], axis=1)
    in_head = np.repeat(np.tile([True, False], len(counts)), counts.reshape(-1))
    ids = np.empty(len(in_head), dtype=np.int32)
    weights = np.full(len(in_head), 0.0 if tau is None else tau, dtype=np.float32)
    ids[in_head], weights[in_head] = targets.head_ids, heads
    ids[~in_head] = targets.tail_ids
    return Entries(ids=ids, weights=weights, offsets=offsets_of(counts.sum(1, dtype=np.int32)))
