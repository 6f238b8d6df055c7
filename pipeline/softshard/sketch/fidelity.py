"""How close the stored sketch of a label is to its target, measured while the dense distribution is in memory.

Only sums are needed. With p the target, s the stored sketch, S its mass, and u = 1/V the output of a uniform student:
|s - p|^2 = |p|^2 + sum over entries of (s_i^2 - 2 s_i p_i); the gradients of the loss at u are u - p and u - s, with
(u - p)(u - s) = sum p_i s_i - S/V, |u - p|^2 = |p|^2 - 1/V, |u - s|^2 = |s|^2 - 2S/V + 1/V.

A trained student's probabilities would dominate both gradients and make every sketch of a peaked distribution look
close. The angle is that of a single position: it counts noise, which averages out over positions, as much as bias.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

__all__ = ["RANKS", "FidelitySums", "StoredLabels", "mass_by_rank", "measure"]

RANKS = (1, 8, 64, 512)
"""The mass of this many most likely tokens is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySums:
    """Sums over labels, which are added up over a part."""

    num_labels: int = 0
    squared_error: float = 0.0
    angle_degrees: float = 0.0
    kl_nats: float = 0.0
    num_entries: int = 0
    num_ranked: int = 0
    """Labels whose mass by rank was measured: a random sample, because it takes a partial sort."""
    mass_1: float = 0.0
    mass_8: float = 0.0
    mass_64: float = 0.0
    mass_512: float = 0.0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLabels:
    """Entries of P labels as a reader decodes them, and the teacher's probabilities of the same tokens."""

    head_count: NDArray[np.int32]
    """[P]"""
    head_weights: NDArray[np.float64]
    """[H]"""
    head_probabilities: NDArray[np.float64]
    """[H]"""
    tail_count: NDArray[np.int32]
    """[P] of one draw."""
    tail_probabilities: NDArray[np.float64]
    """[T]"""
    tau: float
    """Weight of a tail entry."""


def measure(
    stored: StoredLabels, *, square_sums: NDArray[np.float64], vocab_size: int, covers_all: bool
) -> FidelitySums:
    """Sums of all measures of the labels but the mass by rank.

    Args:
        stored: entries and probabilities.
        square_sums: [P] sum of the squared probabilities of each label's whole target.
        vocab_size: V.
        covers_all: the heads cover the whole vocabulary, so that KL(target || stored) is defined.
    """
    labels = len(square_sums)
    heads = np.repeat(np.arange(labels), stored.head_count)
    tails = np.repeat(np.arange(labels), stored.tail_count)
    weights, probabilities, tau = stored.head_weights, stored.head_probabilities, stored.tau

    def per_label(rows: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(rows, weights=values, minlength=labels).astype(np.float64)

    product = per_label(heads, weights * probabilities) + tau * per_label(tails, stored.tail_probabilities)
    square = per_label(heads, weights**2) + tau**2 * stored.tail_count
    mass = per_label(heads, weights) + tau * stored.tail_count
    error = np.maximum(square_sums + square - 2 * product, 0.0)
    lengths = np.sqrt(
        np.maximum(square_sums - 1 / vocab_size, 0.0) * np.maximum(square - (2 * mass - 1) / vocab_size, 0.0)
    )
    cosine = np.divide(product - mass / vocab_size, lengths, out=np.ones(labels), where=lengths > 1e-12)
    kl = 0.0
    if covers_all:
        seen = probabilities > 0
        kl = float(
            np.sum(probabilities[seen] * (np.log(probabilities[seen]) - np.log(np.maximum(weights[seen], 1e-300))))
        )
    return FidelitySums(
        num_labels=labels,
        squared_error=float(error.sum()),
        angle_degrees=float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).sum()),
        kl_nats=kl,
        num_entries=len(weights) + len(stored.tail_probabilities),
    )


def mass_by_rank(most_likely: NDArray[np.float32]) -> FidelitySums:
    """Mass of the RANKS most likely tokens, from [n, at most 512] probabilities of n labels in descending order."""
    running = most_likely.cumsum(1, dtype=np.float64)
    first, eight, more, most = (float(running[:, min(rank, running.shape[1]) - 1].sum()) for rank in RANKS)
    return FidelitySums(num_ranked=len(most_likely), mass_1=first, mass_8=eight, mass_64=more, mass_512=most)
