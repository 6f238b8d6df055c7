"""Targets as (token, weight) entries, the form that losses and metrics read.

The entries of a label are those of the head, then those of the tail. Where the label's own token is mixed in, its entry
comes first.
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
    """Sparse distributions of P labels; the entries of label j are offsets[j]:offsets[j + 1]."""

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
    """Entries of targets. Their weights sum to 1 in expectation with a sampled tail, else to 1 - tail_mass.

    Args:
        targets: of any number of labels.
        tau: weight of a tail entry; None for the kinds without a sampled tail.
        draw: which of the independent tails, from 0, modulo their number; so the number of an epoch can be given.
        temperature: the head becomes p^(1 / temperature), scaled to the same mass. This is the target at that
            temperature where the head is the whole vocabulary, or where it is renormalised (see `takes_temperature`).
        labels: [P] ids of the labels. With them, the first entry of each label is its own token with the weight
            `alpha`, and the weights of all others are multiplied by 1 - alpha.
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
    """Concatenated ranges starts[j], starts[j] + 1, ..., each of length counts[j]: indices of the entries of labels."""
    before = counts_to_offsets(counts)[:-1]
    places: NDArray[np.int64] = np.repeat(starts - before, counts)
    places += np.arange(len(places))
    return places
