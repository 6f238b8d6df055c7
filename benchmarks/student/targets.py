"""The targets that `measure.py` compares: forms in which a student sees the distributions of its teacher.

In: the teacher's logits of a batch of positions. Out: entries and weights. Those of softshard's kinds come from its own
sketch and are decoded as a reader of a part would see them; the others are computed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.config import SketchSettings, ThresholdSketch, TopkSketch
from softshard.sketch.codec import to_mass_grid
from softshard.sketch.reduce import sketch_rows, stored_entries

__all__ = ["TAU", "Batch", "MakeTarget", "Target", "TargetKind", "full", "multinomial", "threshold", "topk"]

TAU = 1 / 24


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some positions of the text."""

    rows: Tensor
    """[n] int64, their places in the text."""
    logits: Tensor
    """[n, V] of the teacher."""
    labels: Tensor
    """[n]"""
    places: Sequence[tuple[str, int]]
    uniforms: NDArray[np.float64]
    """[draws, n] random numbers of softshard's sketches."""
    seed: int
    """Of what the other kinds draw."""

    def first(self, num_rows: int) -> Batch:
        """Its first positions alone."""
        return Batch(
            rows=self.rows[:num_rows],
            logits=self.logits[:num_rows],
            labels=self.labels[:num_rows],
            places=self.places[:num_rows],
            uniforms=self.uniforms[:, :num_rows],
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Entries of n positions, those of position i at offsets[i]:offsets[i + 1]; entries of one id add up."""

    ids: Tensor
    """[E] int64"""
    weights: Tensor
    """[E] float32"""
    offsets: Tensor
    """[n + 1] int64"""
    ghost_mass: Tensor | None = None
    """[n] mass of the one token that stands for all others; None: there is none."""

    def dense(self, *, vocab_size: int) -> Tensor:
        """[n, V] float64, without the ghost."""
        rows = torch.repeat_interleave(self.offsets.diff())
        whole = torch.zeros((len(self.offsets) - 1, vocab_size), dtype=torch.float64)
        return whole.index_put_((rows, self.ids), self.weights.double(), accumulate=True)


MakeTarget = Callable[[Batch, int], Target | None]
"""(positions, number of the draw) -> target; None: the whole distribution."""


@dataclass(frozen=True, slots=True)
class TargetKind:
    target: MakeTarget
    num_draws: int = 1
    """Draws that take turns, one an epoch."""


def full(batch: Batch, draw: int) -> None:
    return None


def threshold(batch: Batch, draw: int) -> Target:
    """Threshold sampling as a part stores it."""
    return _stored(batch, ThresholdSketch(tau=TAU), draw)[0]


def topk(k: int, *, ghost: bool) -> MakeTarget:
    """The k most likely tokens; the rest is a ghost token, or is renormalised away."""

    def target(batch: Batch, draw: int) -> Target:
        entries, tail_mass = _stored(batch, TopkSketch(kind="topk", k=k), draw)
        if ghost:
            return Target(ids=entries.ids, weights=entries.weights, offsets=entries.offsets, ghost_mass=tail_mass)
        kept = (1 - tail_mass).repeat_interleave(entries.offsets.diff())
        return Target(ids=entries.ids, weights=entries.weights / kept, offsets=entries.offsets)

    return target


def multinomial(num_samples: int) -> MakeTarget:
    """So many tokens drawn with replacement, each of weight 1 / num_samples (Sparse Logit Sampling, ACL 2025)."""

    def target(batch: Batch, draw: int) -> Target:
        probabilities = torch.softmax(batch.logits, 1)
        ids = [
            torch.multinomial(
                row, num_samples, replacement=True, generator=_generator(batch.seed, num_samples, place, draw)
            )
            for row, place in zip(probabilities, batch.rows.tolist(), strict=True)
        ]
        return Target(
            ids=torch.cat(ids),
            weights=torch.full((len(ids) * num_samples,), 1 / num_samples),
            offsets=torch.arange(len(ids) + 1) * num_samples,
        )

    return target


def _generator(*purpose: int) -> torch.Generator:
    digest = hashlib.blake2b(" ".join(map(str, purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _stored(batch: Batch, settings: SketchSettings, draw: int) -> tuple[Target, Tensor]:
    """Entries of one draw, and the tail's mass, as a reader of a part sees them."""
    targets, _ = sketch_rows(
        batch.logits,
        labels=batch.labels,
        uniforms=batch.uniforms[draw : draw + 1],
        settings=settings,
        vocab_size=batch.logits.shape[1],
        places=batch.places,
    )
    entries = stored_entries(targets, settings)
    target = Target(
        ids=torch.from_numpy(entries.ids).long(),
        weights=torch.from_numpy(entries.weights),
        offsets=torch.from_numpy(entries.offsets),
    )
    return target, torch.from_numpy(to_mass_grid(targets.tail_mass))
