"""Reverse KL and Jensen-Shannon divergence to a sparse target whose entries are not sampled.

In: hidden states, an output layer, the head of each position and the mass of the rest. Out: a divergence summed over
positions, with its gradients.

It is taken over cells: the tokens of the head, each alone, and one cell that holds all others. With a head of the whole
vocabulary (`full`) that is the divergence of the distributions themselves. Otherwise (`topk`, `nucleus`, with the
ghost's mass) it is, exactly, that of the two distributions coarsened to these cells: no more than that of the
distributions themselves, and equal to it where within the last cell target and model agree. It is 0, with no gradient,
as soon as the cells agree, whatever the model believes of the last one's tokens relative to each other: about these it
teaches nothing but their mass.

A sampled sketch (`threshold`) must not be given, since these divergences, unlike the forward KL, are not linear in the
target: the logarithm of a sample is not that of its mean, and is infinite where a token was not drawn. Nor must a head
that was renormalised, of which the reverse KL is infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss.buckets import TokenBuckets
from softshard.finetune.loss.entries import ChunkedTargets, ChunkEntries
from softshard.finetune.loss.projection import Readout, projected
from softshard.models.decoder import PLAIN_LOGITS, LogitTransform, LowRank

__all__ = ["Divergence", "sparse_divergence"]

Divergence = Literal["reverse", "jensen_shannon"]


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    divergence: Divergence,
    jsd_beta: float,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    temperature: float = 1.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Divergence between target and model over the cells of each position, summed over positions.

    P is the target's mass of a cell, Q the model's, M = beta * P + (1 - beta) * Q:

        reverse         KL(Q || P) = sum Q ln(Q / P)
        jensen_shannon  beta * KL(P || M) + (1 - beta) * KL(Q || M)      (generalised: Agarwal et al., 2306.13649)

    An entry outside the head (`entry_in_head`), such as the label's own share, is added to its token's cell: the head's
    if that token is in it, else the last. Weights need not add up to 1. The reverse KL is infinite where the target has
    no mass in a cell and the model has some, and so where a ghost's mass was rounded to 0; of a token in the head, a
    mass below float32's least normal one counts as that. With a temperature T, Q is of softmax(z / T) and the result
    T^2 times as large. Other arguments, and errors, as in `sparse_kl`.

    Args:
        divergence: which of the two.
        jsd_beta: beta, above 0 and below 1, or ValueError; the reverse KL does not look at it.
    """
    if divergence == "jensen_shannon" and not 0 < jsd_beta < 1:
        raise ValueError(f"jsd_beta is {jsd_beta}, it must be above 0 and below 1")
    readout = Readout(weight, bias, transform, temperature, num_valid, chunk_positions, low_rank)
    chunked = ChunkedTargets.of(targets, hidden=hidden, readout=readout)
    beta = None if divergence == "reverse" else jsd_beta
    return projected(hidden, readout, _BucketDivergence(chunked, beta).loss, kept=chunked.kept)


@dataclass(frozen=True, slots=True)
class _BucketDivergence:
    """Both have slopes dD/dz = Q_c * (g_c - sum_k Q_k g_k) in the cell c, shared by probability within the last: g is
    ln(Q / P) for the reverse KL, and (1 - beta) * ln(Q / M) for the other, whose other terms cancel."""

    chunked: ChunkedTargets
    beta: float | None
    """None: the reverse KL."""

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed divergence of positions [start, stop); their logits become the slopes."""
        entries = self.chunked.chunk(start, stop, num_valid=logits.shape[1])
        cells = TokenBuckets.of(logits, entries.places[entries.in_head])
        alone, rest = _masses(entries, cells)
        alone_cost, alone_slope = self._terms(alone, cells.logprobs)
        rest_cost, rest_slope = self._terms(rest, cells.rest_logprobs)
        alone_q, rest_q = cells.logprobs.exp(), cells.rest_logprobs.exp()
        mean = (rest_q * rest_slope).index_add(0, cells.rows, alone_q * alone_slope)
        cells.slopes_(
            entries.scale[cells.rows] * alone_q * (alone_slope - mean[cells.rows]),
            entries.scale * rest_q * (rest_slope - mean),
        )
        return entries.scale @ rest_cost.index_add(0, cells.rows, alone_cost)

    def _terms(self, mass: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """What cells add to the divergence, and their g; of cells without tokens neither counts."""
        probabilities, log_mass = logprobs.exp(), mass.log()
        empty = torch.isneginf(logprobs)
        if self.beta is None:
            slope = torch.where(empty, 0.0, logprobs - log_mass)
            return probabilities * slope, slope
        middle = torch.logaddexp(math.log(self.beta) + log_mass, math.log(1 - self.beta) + logprobs)
        slope = torch.where(empty, 0.0, (1 - self.beta) * (logprobs - middle))
        of_target = torch.where(mass > 0, self.beta * mass * (log_mass - middle), 0.0)
        return of_target + probabilities * slope, slope


def _masses(entries: ChunkEntries, cells: TokenBuckets) -> tuple[Tensor, Tensor]:
    """[U], [c] mass of the target in the cells."""
    alone, rest = torch.zeros_like(cells.logprobs), entries.ghost.clone()
    alone.index_add_(0, cells.inverse, entries.weights[entries.in_head])
    if isinstance(entries.in_head, Tensor):
        places, rows, outside = (item[~entries.in_head] for item in (entries.places, entries.rows, entries.weights))
        nearest = torch.searchsorted(cells.places, places).clamp(max=max(len(cells.places) - 1, 0))
        found = torch.zeros_like(places, dtype=torch.bool)
        if len(cells.places):
            found = cells.places[nearest] == places
        alone.index_add_(0, nearest[found], outside[found])
        rest.index_add_(0, rows[~found], outside[~found])
    return alone.clamp(min=torch.finfo(torch.float32).tiny), rest
