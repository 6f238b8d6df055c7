"""How near the stored sketch of a label is to its target, measured while the dense distribution is still there.

Only sums are needed. With p the target, s what is stored, u = 1/V a student that knows nothing and S the mass of s:
|s - p|^2 = |p|^2 + sum over entries of (s_i^2 - 2 s_i p_i); the gradients of the loss at u are u - p and u - s, with
(u - p)(u - s) = sum p_i s_i - S/V, |u - p|^2 = |p|^2 - 1/V, |u - s|^2 = |s|^2 - 2S/V + 1/V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softshard.target.codec import offsets_of
from softshard.target.entries import Entries

__all__ = ["FidelitySums", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySums:
    """Sums over labels, to be added up over a part."""

    num_labels: int = 0
    squared_error: float = 0.0
    angle_degrees: float = 0.0
    kl_nats: float = 0.0
    num_entries: int = 0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(
            num_labels=self.num_labels + other.num_labels,
            squared_error=self.squared_error + other.squared_error,
            angle_degrees=self.angle_degrees + other.angle_degrees,
            kl_nats=self.kl_nats + other.kl_nats,
            num_entries=self.num_entries + other.num_entries,
        )


def measure(
    stored: Entries,
    probabilities: NDArray[np.float64],
    *,
    square_sums: NDArray[np.float64],
    vocab_size: int,
    covers_all: bool,
) -> FidelitySums:
    """Fidelity of some labels.

    Args:
        stored: what a reader of the part will see.
        probabilities: [E] the target's probability of each entry.
        square_sums: [P] sum of the squared probabilities of each label's whole target.
        vocab_size: V.
        covers_all: the entries are the whole vocabulary, so that KL(target || stored) is defined.
    """
    counts = np.diff(stored.offsets)
    labels = np.repeat(np.arange(len(counts)), counts)
    weights = stored.weights.astype(np.float64)

    def per_label(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(labels, weights=values, minlength=len(counts)).astype(np.float64)

    product, square, mass = per_label(weights * probabilities), per_label(weights**2), per_label(weights)
    error = np.maximum(square_sums + square - 2 * product, 0.0)
    lengths = np.sqrt(
        np.maximum(square_sums - 1 / vocab_size, 0.0) * np.maximum(square - (2 * mass - 1) / vocab_size, 0.0)
    )
    cosine = np.divide(product - mass / vocab_size, lengths, out=np.ones(len(counts)), where=lengths > 1e-12)
    kl = 0.0
    if covers_all:
        seen = probabilities > 0
        kl = float(
            np.sum(probabilities[seen] * (np.log(probabilities[seen]) - np.log(np.maximum(weights[seen], 1e-300))))
        )
    return FidelitySums(
        num_labels=len(counts),
        squared_error=float(error.sum()),
        angle_degrees=float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).sum()),
        kl_nats=kl,
        num_entries=int(offsets_of(counts.astype(np.int32))[-1]),
    )
