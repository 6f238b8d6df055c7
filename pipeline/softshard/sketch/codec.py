"""Head probabilities as integer steps, tokens as ranks, per-label values on grids, and back.

Encoding reads log-probabilities, in descending order within each label, and token ids, and returns small integers that
compress well. Decoding returns head weights that sum to the head's mass whatever the rounding:
`(1 - tail_mass) * exp(-step * q_i) / sum_j exp(-step * q_j)`. A rank is a token's index in an order that each part has
of its own, frequent tokens first; the ranks of a tail are sorted, which loses nothing: its entries have equal weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LOGPROB_GRID",
    "LOWEST_LOGPROB",
    "MASS_GRID",
    "after_first",
    "counts_to_offsets",
    "decode_head",
    "decode_tail",
    "encode_head",
    "encode_tail",
    "frequent_ids",
    "head_steps",
    "head_weights",
    "ids_by_rank",
    "mass_grid",
    "to_logprob_grid",
    "to_mass_grid",
    "token_ranks",
]

LOGPROB_GRID = 1 / 16
"""Grid, in nats, of stored label log-probabilities and entropies: the rounding error is at most 1/32."""
LOWEST_LOGPROB = -1000.0
"""Lowest stored log-probability, also of an impossible label, so that sums and means stay finite."""
MASS_GRID = 1 / 255
"""Grid of the stored tail mass: the error is at most 1/510. Its 256 values take one byte in Parquet's dictionary."""
_MOST_STEPS = 32767
_OFTEN = 24
"""Fewest occurrences of a frequent id. It takes some six bytes of metadata, and saves as many (measured)."""
_MOST_FREQUENT = 4096


def counts_to_offsets(counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """[n + 1] offsets: the entries of label j are offsets[j]:offsets[j + 1]."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def head_steps(logprobs: NDArray[np.float32], counts: NDArray[np.int32], *, step: float) -> NDArray[np.float64]:
    """[H] distance of each log-probability below the first of its label, in whole steps; at most 32,767.

    With the smallest step, .002, the limit is a probability e^-65 times that of the most likely entry.
    """
    steps: NDArray[np.float64] = np.minimum(np.rint(_below_first(logprobs, counts) / step), _MOST_STEPS)
    return steps


def encode_head(logprobs: NDArray[np.float32], counts: NDArray[np.int32], *, step: float) -> NDArray[np.int16]:
    """Int16 differences between neighbouring `head_steps` of a label: one fewer per label than it has entries."""
    differences = np.diff(head_steps(logprobs, counts, step=step), prepend=0.0)[after_first(counts)]
    if len(differences) and differences.min() < 0:
        raise ValueError("head log-probabilities must be in descending order within each label")
    narrow: NDArray[np.int16] = differences.astype(np.int16)
    return narrow


def after_first(counts: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[H] False for the first entry of each label, True for the others."""
    after = np.ones(int(counts.sum()), dtype=np.bool_)
    after[counts_to_offsets(counts)[:-1][counts > 0]] = False
    return after


def _below_first(logprobs: NDArray[np.floating[Any]], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    """[H] distance below the first entry of the label, in nats."""
    exact = logprobs.astype(np.float64)
    firsts = exact[counts_to_offsets(counts)[:-1][counts > 0]]
    # Heads that were read from a part begin at 0, and then no subtraction is needed.
    return np.repeat(firsts, counts[counts > 0]) - exact if firsts.any() else -exact


def decode_head(differences: NDArray[np.int16], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """[H] int32 steps below the label's most likely entry, the inverse of `encode_head`."""
    after = np.flatnonzero(after_first(counts))
    steps = np.zeros(int(counts.sum()), dtype=np.int32)
    steps[after] = differences
    return _running(steps, counts)


def _running(differences: NDArray[Any], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Running sums within each label.

    The total of the label before is subtracted from each label's first difference, so that a second cumulative sum
    over everything restarts at every label. Sums over all labels may overflow int32 and wrap around; the sums within a
    label are exact as long as they fit.
    """
    sums: NDArray[np.int32] = differences.astype(np.int32)
    starts = counts_to_offsets(counts)[:-1][counts > 0]
    if len(starts):
        through_label_before = np.cumsum(sums, dtype=np.int32)[starts[1:] - 1]
        sums[starts[1:]] -= np.diff(through_label_before, prepend=np.int32(0))
    return np.cumsum(sums, dtype=np.int32, out=sums)


def frequent_ids(ids: NDArray[np.int32], *, vocab_size: int) -> NDArray[np.int32]:
    """Ids that occur often enough to be listed in the metadata, by descending frequency, then by id."""
    counts = np.bincount(ids, minlength=vocab_size)
    often = np.flatnonzero(counts >= _OFTEN)
    order = np.argsort(-counts[often], kind="stable")[:_MOST_FREQUENT]
    chosen: NDArray[np.int32] = often[order].astype(np.int32)
    return chosen


def ids_by_rank(frequent: NDArray[np.int32], *, vocab_size: int) -> NDArray[np.int32]:
    """[V] the id of each rank: the frequent ids, then all others ascending. A part stores ranks."""
    others = np.ones(vocab_size, dtype=np.bool_)
    others[frequent] = False
    return np.concatenate([frequent, np.flatnonzero(others).astype(np.int32)])


def token_ranks(by_rank: NDArray[np.int32]) -> NDArray[np.int32]:
    """[V] the rank of each id, the inverse of `ids_by_rank`."""
    ranks = np.empty_like(by_rank)
    ranks[by_rank] = np.arange(len(by_rank), dtype=np.int32)
    return ranks


def encode_tail(ranks: NDArray[np.int32], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """[T] int32 gaps between the sorted ranks of each label, the first from 0."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts) << 32
    keys = np.sort(labels | ranks)
    gaps = np.diff(keys, prepend=0)
    starts = counts_to_offsets(counts)[:-1][counts > 0]
    gaps[starts] = keys[starts]
    narrow: NDArray[np.int32] = gaps.astype(np.int32)  # drops the label, which fills the upper half
    return narrow


def decode_tail(gaps: NDArray[np.int32], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """[T] ranks, ascending within a label, the inverse of `encode_tail`."""
    return _running(gaps, counts)


def head_weights(
    logprobs: NDArray[np.floating[Any]], counts: NDArray[np.int32], mass: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[H] weights proportional to exp(logprobs), which sum to `mass` [P] in each label that has a head."""
    relative = np.exp(-_below_first(logprobs, counts))
    filled = counts > 0
    if not filled.any():
        return relative
    sums = np.add.reduceat(relative, counts_to_offsets(counts)[:-1][filled])
    weights: NDArray[np.float64] = relative * np.repeat(mass[filled].astype(np.float64) / sums, counts[filled])
    return weights


def to_logprob_grid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest multiples of LOGPROB_GRID."""
    rounded: NDArray[np.float32] = (np.rint(values / LOGPROB_GRID) * LOGPROB_GRID).astype(np.float32)
    return rounded


def mass_grid(tau: float | None) -> float:
    """Grid of the tail mass: MASS_GRID, halved until it is at most tau / 8; tau is None where no tail is sampled.

    The mass of a head is at least tau, so rounding changes it by at most a sixteenth.
    """
    grid = MASS_GRID
    while tau is not None and grid > tau / 8:
        grid /= 2
    return grid


def to_mass_grid(values: NDArray[np.float32], *, tau: float | None = None) -> NDArray[np.float32]:
    """The nearest multiples of the mass grid, from 0 to 1."""
    levels = round(1 / mass_grid(tau))
    rounded: NDArray[np.float32] = np.clip(np.rint(values.astype(np.float64) * levels) / levels, 0.0, 1.0).astype(
        np.float32
    )
    return rounded
