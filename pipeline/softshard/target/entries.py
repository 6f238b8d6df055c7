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


def entries_of(targets: SequenceTargets, *, step: float, tau: float | None) -> Entries:
    """Entries whose weights sum, in expectation, to 1 (threshold), or to 1 - tail_mass (the other kinds).

    `tau` is the weight of a tail entry, None where the kind has none.
    """
    steps = np.rint(targets.head_logprobs.astype(np.float64) / -step).astype(np.int32)
    heads = head_weights(steps, targets.head_count, 1 - targets.tail_mass, step=step)
    offsets = offsets_of(targets.head_count + targets.tail_count)
    ids = np.empty(offsets[-1], dtype=np.int32)
    weights = np.empty(offsets[-1], dtype=np.float32)
    head_at = _places(offsets[:-1], targets.head_count)
    tail_at = _places(offsets[:-1] + targets.head_count, targets.tail_count)
    ids[head_at], weights[head_at] = targets.head_ids, heads
    ids[tail_at], weights[tail_at] = targets.tail_ids, 0.0 if tau is None else tau
    return Entries(ids=ids, weights=weights, offsets=offsets)


def _places(starts: NDArray[np.int64], counts: NDArray[np.int32]) -> NDArray[np.int64]:
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(offsets_of(counts)[:-1], counts)
    places: NDArray[np.int64] = np.repeat(starts, counts) + within
    return places
