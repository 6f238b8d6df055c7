"""The divergences to a sparse target, and those that are taken over buckets: reverse KL and Jensen-Shannon.

In: the logits of a chunk of positions, the head of each position and the mass of the rest. Out: a divergence summed
over positions, and its slopes against the logits.

The buckets of a position are the tokens of its head, one each, and a last one with all other tokens. If the head is the
whole vocabulary (`full`), a divergence over buckets is that of the distributions themselves. Otherwise (`topk`,
`nucleus`, with the ghost's mass) it is a lower bound of it, equal where target and model agree on the relative
probabilities within the last bucket. It is 0, with no gradient, as soon as the masses of the buckets agree: of the
tokens in the last bucket it teaches only their total mass.

Sampled sketches (`threshold`) are not allowed, because these divergences, unlike the forward KL, are not linear in the
target: the logarithm of a sample is biased, and infinite where a token was not drawn. Nor are renormalised heads, for
which the reverse KL is infinite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.config.train import Divergence
from softshard.finetune.loss.buckets import TokenBuckets
from softshard.finetune.loss.entries import ChunkedTargets, ChunkEntries
from softshard.finetune.loss.forward_kl import ForwardKL
from softshard.finetune.loss.projection import ChunkLoss

__all__ = ["DIVERGENCES"]


@dataclass(frozen=True, slots=True)
class _BucketDivergence(ABC):
    """A sum over buckets. With g the derivative that `terms` gives, the slopes are
    dD/dz = Q_c * (g_c - sum_k Q_k g_k) for a bucket c; within the last one they are shared by probability."""

    chunked: ChunkedTargets

    @abstractmethod
    def terms(self, mass: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of the divergence for buckets of some mass in the target, and g; both 0 for buckets without tokens."""

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed divergence of positions [start, stop); their logits become the slopes."""
        entries = self.chunked.chunk(start, stop, num_valid=logits.shape[1])
        buckets = TokenBuckets.of(logits, entries.places[entries.in_head])
        alone, rest = _masses(entries, buckets)
        alone_cost, alone_slope = self.terms(alone, buckets.logprobs)
        rest_cost, rest_slope = self.terms(rest, buckets.rest_logprobs)
        alone_q, rest_q = buckets.logprobs.exp(), buckets.rest_logprobs.exp()
        mean = (rest_q * rest_slope).index_add(0, buckets.rows, alone_q * alone_slope)
        buckets.slopes_(
            entries.scale[buckets.rows] * alone_q * (alone_slope - mean[buckets.rows]),
            entries.scale * rest_q * (rest_slope - mean),
        )
        return entries.scale @ rest_cost.index_add(0, buckets.rows, alone_cost)


class _ReverseKL(_BucketDivergence):
    """KL(Q || P), with g = ln(Q / P)."""

    def terms(self, mass: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Q ln(Q / P), ln(Q / P)."""
        slope = torch.where(torch.isneginf(logprobs), 0.0, logprobs - mass.log())
        return logprobs.exp() * slope, slope


@dataclass(frozen=True, slots=True)
class _JensenShannon(_BucketDivergence):
    """beta * KL(P || M) + (1 - beta) * KL(Q || M), with g = (1 - beta) * ln(Q / M): the other terms cancel."""

    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"jsd_beta is {self.beta}, it must be above 0 and below 1")

    def terms(self, mass: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """beta P ln(P / M) + Q g, g."""
        log_mass = mass.log()
        middle = torch.logaddexp(math.log(self.beta) + log_mass, math.log(1 - self.beta) + logprobs)
        slope = torch.where(torch.isneginf(logprobs), 0.0, (1 - self.beta) * (logprobs - middle))
        of_target = torch.where(mass > 0, self.beta * mass * (log_mass - middle), 0.0)
        return of_target + logprobs.exp() * slope, slope


def _masses(entries: ChunkEntries, buckets: TokenBuckets) -> tuple[Tensor, Tensor]:
    """[U], [c] mass of the target in the buckets."""
    alone, rest = torch.zeros_like(buckets.logprobs), entries.ghost.clone()
    alone.index_add_(0, buckets.inverse, entries.weights[entries.in_head])
    if isinstance(entries.in_head, Tensor):
        places, rows, outside = (item[~entries.in_head] for item in (entries.places, entries.rows, entries.weights))
        nearest = torch.searchsorted(buckets.places, places).clamp(max=max(len(buckets.places) - 1, 0))
        found = torch.zeros_like(places, dtype=torch.bool)
        if len(buckets.places):
            found = buckets.places[nearest] == places
        alone.index_add_(0, nearest[found], outside[found])
        rest.index_add_(0, rows[~found], outside[~found])
    return alone.clamp(min=torch.finfo(torch.float32).tiny), rest


DIVERGENCES: dict[Divergence, Callable[[ChunkedTargets, float], ChunkLoss]] = {
    "forward": lambda chunked, beta: ForwardKL(chunked).loss,
    "reverse": lambda chunked, beta: _ReverseKL(chunked).loss,
    "jensen_shannon": lambda chunked, beta: _JensenShannon(chunked, beta).loss,
}
"""The loss of a chunk for each divergence, from the targets and the beta of Jensen-Shannon."""
