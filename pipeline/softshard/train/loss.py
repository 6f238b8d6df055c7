"""Losses of a language model from its hidden states and its output matrix, without the logits of all positions.

In: hidden states [N, d], an output matrix [V, d] and a target for each position. Out: the sum over positions of a
divergence, whose gradients are computed with it, chunk by chunk of positions. No [N, V] tensor outlives a chunk:
autograd keeps the gradient of the hidden states, and of the output matrix where that is trained.

Products are taken in the matrix's type, all else in float32, or in float64 where the hidden states are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dense_kl", "sparse_kl"]

_ChunkLoss = Callable[[Tensor, int, int], Tensor]
"""Takes the logits [c, V] of positions [start, stop), puts their gradient in their place, returns their summed loss."""


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
) -> Tensor:
    """KL(target || model), up to the target's own entropy, summed over positions.

    A position adds w * (m * lse(z) - sum_i P_i z_i): the cross-entropy to its entries, of mass m = sum_i P_i, which
    need not be 1, so that an unbiased sketch gives an unbiased gradient. Entries with the same id add up. The caller
    divides by the sum of the weights.

    With `tail_mass` one ghost token stands for all tokens outside the head and adds -w * tail * ln(1 - sum_head
    softmax(z)), computed from the tokens outside, so that it stays finite when the head takes all the mass. A head that
    is the whole vocabulary leaves no ghost.

    Args:
        hidden: [N, d].
        weight: [V, d] output matrix.
        entry_ids: [E] int64, below `num_valid`; those of position n lie at entry_offsets[n]:entry_offsets[n + 1].
        entry_weights: [E].
        entry_offsets: [N + 1] int64.
        tail_mass: [N] mass of the ghost token; None: there is none.
        position_weights: [N]; None: all 1.
        num_valid: vocabulary of the data; logits from there on are padding and left out.
        chunk_positions: positions whose logits exist at one time.
        bias: [V] of the output layer.
        entry_in_head: [E] bool, the entries that the ghost token does not stand for; None: all of them.

    Raises:
        ValueError: sizes that do not fit together, or an id that is not below `num_valid`.
    """
    _check_sizes(hidden, weight, num_valid, chunk_positions)
    if len(entry_offsets) != len(hidden) + 1:
        raise ValueError(
            f"{len(entry_offsets)} offsets for {len(hidden)} positions, there must be one more than positions"
        )
    if len(entry_ids) and int(entry_ids.max()) >= num_valid:
        raise ValueError(f"entry id {int(entry_ids.max())} is not in the vocabulary of {num_valid}")
    kind = _accumulation(hidden)
    target = _SparseTarget(
        ids=entry_ids,
        weights=entry_weights.to(kind),
        counts=entry_offsets.diff(),
        bounds=entry_offsets.tolist(),
        tail=None if tail_mass is None else tail_mass.to(kind),
        in_head=entry_in_head,
        positions=_ones_or(position_weights, hidden, kind),
    )
    return _projected(hidden, weight, bias, target.loss, num_valid, chunk_positions)


def dense_kl(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    *,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    """KL(base || model) over the whole vocabulary, summed over positions; gradients reach `hidden` alone.

    `base_hidden` [N, d] goes through the same output matrix and bias; other arguments as in `sparse_kl`.

    Raises:
        ValueError: sizes that do not fit together, or an output matrix that is trained, which the base does not share.
    """
    _check_sizes(hidden, weight, num_valid, chunk_positions)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the output layer is trained, so it is not the base's")
    if base_hidden.shape != hidden.shape:
        raise ValueError(f"base_hidden is {tuple(base_hidden.shape)}, hidden {tuple(hidden.shape)}; they must be alike")
    kind = _accumulation(hidden)
    scratch = torch.empty((3, min(chunk_positions, len(hidden)), num_valid), dtype=kind, device=hidden.device)
    target = _DenseTarget(
        hidden=base_hidden.detach(),
        weight=weight,
        bias=bias,
        scratch=scratch,
        positions=_ones_or(position_weights, hidden, kind),
    )
    return _projected(hidden, weight, bias, target.loss, num_valid, chunk_positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SparseTarget:
    """Entries of all positions, and the loss of a chunk of them."""

    ids: Tensor
    weights: Tensor
    counts: Tensor
    bounds: list[int]
    tail: Tensor | None
    in_head: Tensor | None
    positions: Tensor

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed loss of positions [start, stop); their logits become the gradient."""
        entries = slice(self.bounds[start], self.bounds[stop])
        rows = torch.repeat_interleave(self.counts[start:stop])
        places = rows * logits.shape[1] + self.ids[entries]
        scale = self.positions[start:stop]
        given = self.weights[entries] * scale[rows]
        mass = torch.zeros_like(scale).index_add_(0, rows, given)
        chosen = logits.view(-1)[places]
        outside = None
        if self.tail is not None:
            in_head = places if self.in_head is None else places[self.in_head[entries]]
            outside, log_outside = _outside(logits, in_head)
            ghost = torch.where(torch.isfinite(log_outside), scale * self.tail[start:stop], 0.0)
            mass = mass + ghost
        top = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(top).exp_().sum(dim=1)
        lse = top[:, 0] + total.log()
        loss = (given * (lse[rows] - chosen)).sum()
        logits.mul_((mass / total)[:, None])
        if outside is not None:
            loss = loss + torch.where(ghost > 0, ghost * (lse - log_outside), 0.0).sum()
            logits.sub_(outside.mul_(ghost[:, None]))
        logits.view(-1).index_add_(0, places, given, alpha=-1)
        return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class _DenseTarget:
    """Hidden states of the base, the output layer that it shares, and the loss of a chunk of positions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scratch: Tensor
    """[3, chunk, V]"""
    positions: Tensor

    def loss(self, logits: Tensor, start: int, stop: int) -> Tensor:
        """Summed loss of positions [start, stop); their logits become the gradient."""
        base, probability, own = self.scratch[:, : stop - start]
        _project(self.hidden[start:stop], self.weight, self.bias, out=base, product=None)
        _log_softmax(base, probability)
        _log_softmax(logits, own)
        scale = self.positions[start:stop]
        divergence: Tensor = base.sub_(logits).mul_(probability).sum(dim=1) @ scale
        torch.sub(own, probability, out=logits).mul_(scale[:, None])
        return divergence


def _log_softmax(logits: Tensor, probability: Tensor) -> None:
    """Turn logits [c, V] into their log-softmax in place, and put the softmax into `probability`."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    total = torch.exp(logits, out=probability).sum(dim=1, keepdim=True)
    logits.sub_(total.log())
    probability.div_(total)


def _outside(logits: Tensor, in_head: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [c, V] over the tokens outside the head, and the log-sum-exp [c] of their logits, -inf if there are none.

    `in_head` are places in the flattened logits; one that is named twice is the same as once.
    """
    rest = logits.clone()
    rest.view(-1)[in_head] = -torch.inf
    top = rest.amax(dim=1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = rest.sub_(top).exp_().sum(dim=1, keepdim=True)
    rest.div_(torch.where(total > 0, total, 1.0))
    return rest, (top + total.log())[:, 0]


class _Projected(torch.autograd.Function):
    """Sum of a loss of `hidden @ weight.T + bias`, chunk by chunk, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_loss: _ChunkLoss,
        num_valid: int,
        chunk_positions: int,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        kind = _accumulation(hidden)
        valid, valid_bias = weight[:num_valid], None if bias is None else bias[:num_valid]
        size = (min(chunk_positions, len(hidden)), num_valid)
        # Used again by every chunk: fresh memory of this size costs more than the arithmetic on it.
        buffer = torch.empty(size, dtype=kind, device=hidden.device)
        product = None if weight.dtype == kind else torch.empty(size, dtype=weight.dtype, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        weight_grad = torch.zeros_like(weight, dtype=kind) if wanted[1] else None
        bias_grad = torch.zeros_like(bias, dtype=kind) if bias is not None and wanted[2] else None
        loss = torch.zeros((), dtype=kind, device=hidden.device)
        for start in range(0, len(hidden), chunk_positions):
            stop = min(start + chunk_positions, len(hidden))
            part, logits = hidden[start:stop], buffer[: stop - start]
            _project(part, valid, valid_bias, out=logits, product=product)
            loss += chunk_loss(logits, start, stop)
            slope = logits if product is None else product[: stop - start].copy_(logits)
            if hidden_grad is not None:
                hidden_grad[start:stop] = slope @ valid
            if weight_grad is not None:
                weight_grad[:num_valid] += slope.T @ part.to(weight.dtype)
            if bias_grad is not None:
                bias_grad[:num_valid] += logits.sum(dim=0)
        ctx.save_for_backward(
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias is None or bias_grad is None else bias_grad.to(bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # A scalar tensor keeps its own precision beside a bfloat16 one; cast to it, 1/N would be off by up to .4%.
        gradients = [None if saved is None else saved * grad_outputs[0] for saved in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


def _projected(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: _ChunkLoss, num_valid: int, chunk_positions: int
) -> Tensor:
    tracked = torch.is_grad_enabled()
    wanted = tuple(tracked and item is not None and item.requires_grad for item in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _Projected.apply
        return apply(hidden, weight, bias, loss, num_valid, chunk_positions, wanted)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor, product: Tensor | None) -> None:
    """Logits of `out.shape[1]` tokens into `out`, by way of `product` where the matrix has another type."""
    matrix = weight[: out.shape[1]].T
    hidden = hidden.to(weight.dtype)
    if out.dtype == weight.dtype:
        torch.mm(hidden, matrix, out=out)
    elif product is None:
        out.copy_(hidden @ matrix)
    else:
        out.copy_(torch.mm(hidden, matrix, out=product[: len(hidden)]))
    if bias is not None:
        out.add_(bias[: out.shape[1]])


def _ones_or(position_weights: Tensor | None, hidden: Tensor, kind: torch.dtype) -> Tensor:
    if position_weights is None:
        return torch.ones(len(hidden), dtype=kind, device=hidden.device)
    return position_weights.to(kind)


def _accumulation(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check_sizes(hidden: Tensor, weight: Tensor, num_valid: int, chunk_positions: int) -> None:
    if chunk_positions < 1:
        raise ValueError(f"chunk_positions is {chunk_positions}, it must be at least 1")
    if not 0 < num_valid <= len(weight):
        raise ValueError(f"num_valid is {num_valid}, the output matrix has {len(weight)} rows")
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}; their last sizes must agree")
