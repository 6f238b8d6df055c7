"""Forward KL to a sparse target, KL(target || model).

In: the logits of a chunk of positions and the targets' entries. Out: the cross-entropy to the entries, summed over
positions, and its slopes against the logits. Guaranteed: the loss is linear in the target, so a sketch that is unbiased
gives an unbiased loss and unbiased gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.finetune.loss.buckets import TokenBuckets
from softshard.finetune.loss.entries import ChunkedTargets, ChunkEntries

__all__ = ["ForwardKL"]


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """Cross-entropy to the entries of each position, and to its ghost token."""

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
    buckets = TokenBuckets.of(logits, entries.places[entries.in_head])
    ghost = torch.where(torch.isfinite(buckets.rest_logprobs), entries.scale * entries.ghost, 0.0)
    mass = mass + ghost
    slopes = buckets.slopes_(mass[buckets.rows] * buckets.logprobs.exp(), mass * buckets.rest_logprobs.exp() - ghost)
    slopes.view(-1).index_add_(0, entries.places, given, alpha=-1)
    missed = torch.where(ghost > 0, ghost * buckets.rest_logprobs, 0.0).sum()
    return (given * (buckets.lse[entries.rows] - chosen)).sum() - missed
