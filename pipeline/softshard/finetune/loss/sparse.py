"""Forward KL to a sparse target.

In: hidden states, an output layer, entries of each position. Out: the cross-entropy to the entries, summed over
positions, with its gradients. Guaranteed: the loss is linear in the target, so that a sketch that is right in
expectation gives a loss and gradients that are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.finetune.loss.buckets import TokenBuckets
from softshard.finetune.loss.entries import ChunkEntries, SparseTarget
from softshard.finetune.loss.projection import Readout, projected
from softshard.models.decoder import PLAIN_LOGITS, LogitTransform, LowRank

__all__ = ["sparse_kl"]


def sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    *,
    entry_ids: Tensor,
    entry_weights: Tensor,
    entry_offsets: Tensor,
    tail_mass: Tensor | None,
    position_weights: Tensor | None,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    entry_in_head: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    temperature: float = 1.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """KL(target || model), up to the target's own entropy, summed over positions.

    With z the logits, a position adds w * (m * lse(z) - sum_i P_i z_i): the cross-entropy to its entries, of mass
    m = sum_i P_i, which need not be 1. Entries with the same id add up. The caller divides by the sum of the weights,
    over all ranks where there are several.

    With `tail_mass` one ghost token stands for all tokens outside the head and adds -w * tail * ln(1 - sum_head
    softmax(z)), computed from the tokens outside, so that it stays finite when the head takes all the mass. A head that
    is the whole vocabulary leaves no ghost.

    With a temperature T it is T^2 * KL(p_T || softmax(z / T)), whose gradients keep their size as T grows (Hinton,
    Vinyals, Dean, 2015, section 2). The target is taken as given: it should be p_T, proportional to p^(1/T).

    Args:
        hidden: [N, d].
        weight: [V, d] output matrix.
        entry_ids: [E] int64, below `num_valid`; those of position n lie at entry_offsets[n]:entry_offsets[n + 1].
        entry_weights: [E].
        entry_offsets: [N + 1] int64.
        tail_mass: [N] mass of the ghost token; None: there is none.
        position_weights: [N]; None: all 1. Positions of weight 0 cost nothing and are not looked at.
        num_valid: vocabulary of the data; logits from there on are padding and left out.
        chunk_positions: positions whose logits exist at one time.
        bias, transform: [V] of the output layer; from its product to the logits.
        entry_in_head: [E] bool, the entries that the ghost token does not stand for; None: all of them.
        temperature: T.
        low_rank: what an adapter of the output layer adds to the product, [N, r] features and [V, r] factor.

    Raises:
        ValueError: sizes that do not fit together, or an id that is not below `num_valid`.
    """
    readout = Readout(weight, bias, transform, temperature, num_valid, chunk_positions, low_rank)
    target = SparseTarget.of(
        hidden,
        readout,
        entry_ids=entry_ids,
        entry_weights=entry_weights,
        entry_offsets=entry_offsets,
        tail_mass=tail_mass,
        entry_in_head=entry_in_head,
        position_weights=position_weights,
    )
    return projected(hidden, readout, _ForwardKL(target).loss, kept=target.kept)


@dataclass(frozen=True, slots=True)
class _ForwardKL:
    target: SparseTarget

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed loss of positions [start, stop); their logits become the slopes."""
        entries = self.target.chunk(start, stop, num_valid=logits.shape[1])
        given = entries.weights * entries.scale[entries.rows]
        mass = torch.zeros_like(entries.scale).index_add_(0, entries.rows, given)
        chosen = logits.view(-1)[entries.places]
        if self.target.tail is not None:
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
