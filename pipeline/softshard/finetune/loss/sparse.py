"""Forward KL to a sparse target.

In: hidden states, an output layer, entries of each position. Out: the cross-entropy to the entries, summed over
positions, with its gradients. Guaranteed: the loss is linear in the target, so that a sketch that is right in
expectation gives a loss and gradients that are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss.buckets import TokenBuckets
from softshard.finetune.loss.entries import ChunkedTargets, ChunkEntries
from softshard.finetune.loss.projection import Readout, projected
from softshard.models.decoder import PLAIN_LOGITS, LogitTransform, LowRank

__all__ = ["sparse_kl"]


def sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    temperature: float = 1.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """KL(target || model), up to the target's own entropy, summed over positions.

    With z the logits, a position adds w * (m * lse(z) - sum_i P_i z_i): the cross-entropy to its entries, whose mass
    m = sum_i P_i need not be 1. Divide the result by the sum of the weights, over all ranks where there are several.

    With `targets.tail_mass`, a ghost token represents all tokens outside the head and adds
    -w * tail * ln(1 - sum_head softmax(z)). It is computed from the tokens outside, so that it stays finite when the
    head takes all the mass. If the head is the whole vocabulary, there is no ghost token.

    With a temperature T the loss is T^2 * KL(p_T || softmax(z / T)), whose gradients keep their size as T grows
    (Hinton, Vinyals, Dean, 2015, section 2). The targets are used as given: they should be p_T, proportional to
    p^(1/T).

    Args:
        hidden: [N, d] hidden states, one for each label of `targets`.
        weight: [V, d] output matrix.
        targets: of the N labels, with ids below `num_valid`.
        num_valid: vocabulary of the data; further logits are padding and are left out.
        chunk_positions: positions whose logits exist at one time.
        bias: [V] bias of the output layer.
        transform: from the output layer's product to the logits.
        temperature: T.
        low_rank: what an adapter of the output layer adds to the product: [N, r] features and a [V, r] factor.

    Raises:
        ValueError: sizes do not fit together, or an id is not below `num_valid`.
    """
    readout = Readout(weight, bias, transform, temperature, num_valid, chunk_positions, low_rank)
    chunked = ChunkedTargets.of(targets, hidden=hidden, readout=readout)
    return projected(hidden, readout, _ForwardKL(chunked).loss, kept=chunked.kept)


@dataclass(frozen=True, slots=True)
class _ForwardKL:
    chunked: ChunkedTargets

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed loss of positions [start, stop); their logits become the slopes."""
        entries = self.chunked.chunk(start, stop, num_valid=logits.shape[1])
        given = entries.weights * entries.scale[entries.rows]
        mass = torch.zeros_like(entries.scale).index_add_(0, entries.rows, given)
        chosen = logits.view(-1)[entries.places]
        if self.chunked.targets.tail_mass is not None:
            return _with_ghost(logits, entries, given, mass, chosen)
        top = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(top).exp_().sum(dim=1)
        lse = top[:, 0] + total.log()
        logits.mul_((mass / total)[:, None])
        logits.view(-1).index_add_(0, entries.places, given, alpha=-1)
        return (given * (lse[entries.rows] - chosen)).sum()


def _with_ghost(logits: Tensor, entries: ChunkEntries, given: Tensor, mass: Tensor, chosen: Tensor) -> Tensor:
    cells = TokenBuckets.of(logits, entries.places[entries.in_head])
    ghost = torch.where(torch.isfinite(cells.rest_logprobs), entries.scale * entries.ghost, 0.0)
    mass = mass + ghost
    slopes = cells.slopes_(mass[cells.rows] * cells.logprobs.exp(), mass * cells.rest_logprobs.exp() - ghost)
    slopes.view(-1).index_add_(0, entries.places, given, alpha=-1)
    missed = torch.where(ghost > 0, ghost * cells.rest_logprobs, 0.0).sum()
    return (given * (cells.lse[entries.rows] - chosen)).sum() - missed
