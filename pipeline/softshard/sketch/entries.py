"""Targets as (token, weight) entries: what a loss or a metric needs of them.

In: targets as a part holds them, of any number of labels. Out: for each label its head entries, then its tail entries;
where the label's own token is mixed in, that one comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.sketch.codec import counts_to_offsets, head_weights
from softshard.sketch.types import SequenceTargets

__all__ = ["Entries", "entries_of", "ranges_from"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Sparse distributions of P labels; those of label j are offsets[j]:offsets[j + 1]."""

    ids: NDArray[np.int32]
    """[E]"""
    weights: NDArray[np.float32]
    """[E]"""
    offsets: NDArray[np.int64]
    """[P + 1]"""


def entries_of(
    targets: SequenceTargets,
    *,
    tau: float | None,
    draw: int = 0,
    temperature: float = 1.0,
    labels: NDArray[np.int32] | None = None,
    alpha: float = 0.0,
) -> Entries:
    """Entries whose weights sum, in expectation, to 1 (threshold), or to 1 - tail_mass (the other kinds).

    Args:
        targets: of any number of labels.
        tau: weight of a tail entry, None where the kind has none.
        draw: which of the independent tails; counted from 0, and from 0 again after the last, so an epoch will do.
        temperature: the head becomes p^(1 / temperature), of the same mass. That is the target at that temperature
            where the head is the whole vocabulary, or where what is left out is to be renormalised away.
        labels: [P] ids of the labels. With them, each label has an entry of weight `alpha` for its own token before all
            others, which then weigh (1 - alpha) of what they would.
        alpha: weight of the label's own token.
    """
    targets = targets.of_draw(draw)
    logprobs = targets.head_logprobs if temperature == 1 else targets.head_logprobs / temperature
    heads = head_weights(logprobs, targets.head_count, (1 - alpha) * (1 - targets.tail_mass))
    extra = 0 if labels is None else 1
    counts = targets.head_count + targets.tail_count + extra
    offsets = counts_to_offsets(counts)
    ids = np.empty(offsets[-1], dtype=np.int32)
    weights = np.full(len(ids), 0.0 if tau is None else (1 - alpha) * tau, dtype=np.float32)
    if labels is not None:
        ids[offsets[:-1]], weights[offsets[:-1]] = labels, alpha
    head_places = ranges_from(offsets[:-1] + extra, targets.head_count)
    ids[head_places], weights[head_places] = targets.head_ids, heads
    ids[ranges_from(offsets[1:] - targets.tail_count, targets.tail_count)] = targets.tail_ids
    return Entries(ids=ids, weights=weights, offsets=offsets)


def ranges_from(starts: NDArray[np.int64], counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Whole numbers from starts[j] on, counts[j] of them, run after run: where the entries of each label go."""
    before = counts_to_offsets(counts)[:-1]
    places: NDArray[np.int64] = np.repeat(starts - before, counts)
    places += np.arange(len(places))
    return places
