"""Head probabilities as whole steps, per-label values on grids, and back.

In: log-probabilities, sorted by falling probability within each label. Out: int16 differences of `-log p / step`,
rounded. Decoding gives weights whose sum is the head's mass whatever the rounding:
`(1 - tail_mass) * exp(-step * q_i) / sum_j exp(-step * q_j)`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LOGPROB_GRID",
    "MASS_GRID",
    "decode_head",
    "encode_head",
    "head_weights",
    "offsets_of",
    "to_logprob_grid",
    "to_mass_grid",
]

LOGPROB_GRID = 2.0**-5
"""Grid, in nats, of stored label log-probabilities and entropies: off by at most 1/64."""
MASS_GRID = 2.0**-10
"""Grid of the stored tail mass: off by at most 1/2048."""
_MOST_STEPS = 32767


def offsets_of(counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """[n + 1] running sums of counts: the entries of label j lie at offsets[j]:offsets[j + 1]."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def encode_head(logprobs: NDArray[np.float32], counts: NDArray[np.int32], *, step: float) -> NDArray[np.int16]:
    """[H] int16: each label's `-log p` in steps, less the one before it, the first from 0.

    Steps stop at 32,767, so that no difference overflows; with a step of .02 that is a probability of e^-655.
    """
    steps = np.clip(np.rint(logprobs.astype(np.float64) / -step), 0, _MOST_STEPS).astype(np.int32)
    differences = np.diff(steps, prepend=np.int32(0))
    starts = offsets_of(counts)[:-1][counts > 0]
    differences[starts] = steps[starts]
    if len(differences) and differences.min() < 0:
        raise ValueError("head log-probabilities must fall within each label")
    narrow: NDArray[np.int16] = differences.astype(np.int16)
    return narrow


def decode_head(differences: NDArray[np.int16], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """[H] int32: `-log p` in steps, the inverse of `encode_head`."""
    running = np.cumsum(differences, dtype=np.int64)
    before = np.concatenate([np.zeros(1, np.int64), running])[offsets_of(counts)[:-1]]
    steps: NDArray[np.int32] = (running - np.repeat(before, counts)).astype(np.int32)
    return steps


def head_weights(
    steps: NDArray[np.int32], counts: NDArray[np.int32], mass: NDArray[np.float32], *, step: float
) -> NDArray[np.float64]:
    """[H] weights that sum to `mass` [P] within each label that has a head."""
    relative = np.exp(-step * steps.astype(np.float64))
    offsets = offsets_of(counts)
    sums = np.zeros(len(counts))
    filled = counts > 0
    if filled.any():
        sums[filled] = np.add.reduceat(relative, offsets[:-1][filled])
    scale = np.divide(mass.astype(np.float64), sums, out=np.zeros(len(sums)), where=filled)
    weights: NDArray[np.float64] = relative * np.repeat(scale, counts)
    return weights


def to_logprob_grid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest multiples of LOGPROB_GRID."""
    rounded: NDArray[np.float32] = (np.rint(values / LOGPROB_GRID) * LOGPROB_GRID).astype(np.float32)
    return rounded


def to_mass_grid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest multiples of MASS_GRID, within 0 and 1."""
    rounded: NDArray[np.float32] = np.clip(np.rint(values / MASS_GRID) * MASS_GRID, 0.0, 1.0).astype(np.float32)
    return rounded
