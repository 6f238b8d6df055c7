"""Forward KL over the whole vocabulary to a frozen base that shares the output layer.

In: hidden states of the model and of its base, their shared output layer, and what an adapter adds to the model's
logits. Out: the KL summed over positions, with the gradients of the model's hidden states and of the adapter's halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.finetune.loss.projection import Buffers, OutputLayer, accumulation, chunked_loss, positions_with_weight
from softshard.models.decoder import PLAIN_LOGITS, LogitTransform, LowRank

__all__ = ["dense_kl"]


def dense_kl(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    *,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    position_weights: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    low_rank: LowRank | None = None,
) -> Tensor:
    """KL(base || model) over the whole vocabulary, summed over positions; gradients reach `hidden` and `low_rank`.

    `base_hidden` [N, d] is projected by the same output matrix, bias and transform, but without `low_rank`, which only
    the model has. `position_weights` [N] are the weights of the positions; None: all 1. Other arguments as in
    `sparse_kl`.

    Raises:
        ValueError: sizes do not fit together, or the output matrix is trained, so that the base does not share it.
    """
    output_layer = OutputLayer(weight, bias, transform, 1.0, num_valid, chunk_positions, low_rank)
    output_layer.check(hidden)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the output layer is trained, so it is not the base's")
    if base_hidden.shape != hidden.shape:
        raise ValueError(f"base_hidden is {tuple(base_hidden.shape)}, hidden {tuple(hidden.shape)}; they must be alike")
    kind, kept, positions = accumulation(hidden), None, torch.ones(len(hidden), device=hidden.device)
    if position_weights is not None:
        positions, kept = position_weights, positions_with_weight(position_weights)
    num = len(hidden) if kept is None else len(kept)
    target = _DenseTarget(
        hidden=base_hidden.detach(),
        output_layer=output_layer,
        buffers=output_layer.buffers(num, kind),
        scratch=torch.empty((2, min(chunk_positions, num), num_valid), dtype=kind, device=hidden.device),
        positions=positions.to(kind),
        kept=torch.arange(num, device=hidden.device) if kept is None else kept,
    )
    return chunked_loss(hidden, output_layer, target.loss, kept=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DenseTarget:
    """Hidden states of the base, the shared output layer, and the loss of a chunk of positions."""

    hidden: Tensor
    output_layer: OutputLayer
    buffers: Buffers
    scratch: Tensor
    """[2, chunk, V]"""
    positions: Tensor
    """[N] weights."""
    kept: Tensor
    """[M] int64"""

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed loss of the kept positions [start, stop); their logits become the slopes."""
        rows = self.kept[start:stop]
        probability, own = self.scratch[:, : stop - start]
        base = self.output_layer.logits(self.hidden[rows], self.buffers)
        _log_softmax(base, probability)
        _log_softmax(logits, own)
        scale = self.positions[rows]
        divergence: Tensor = base.sub_(logits).mul_(probability).sum(dim=1) @ scale
        torch.sub(own, probability, out=logits).mul_(scale[:, None])
        return divergence


def _log_softmax(logits: Tensor, probability: Tensor) -> None:
    """Turn logits [c, V] into their log-softmax in place, and write the softmax to `probability`."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    total = torch.exp(logits, out=probability).sum(dim=1, keepdim=True)
    logits.sub_(total.log())
    probability.div_(total)
