"""Hidden states through an output layer to a loss and its gradients, chunk by chunk of positions.

In: hidden states [N, d], an output matrix [V, d], what a low-rank adapter adds to their product, the model's transform
of the product, and a function that turns the logits of a chunk into their loss and slopes. Out: the summed loss, whose
gradients are computed with it. No [N, V] tensor outlives a chunk: autograd keeps the gradients of the hidden states, of
the adapter's features [N, r] and factor [V, r], and of the output layer if it is trained.

The gradients are computed and stored in the forward pass. Computing them in the backward pass would repeat the product
with the output matrix. Measured (one core, V = 49,152), that takes 1.52 times as long with a frozen matrix and 1.35
times with a trained one; it saves no memory with the former, and 4% of the peak with the latter (242 MiB instead of
253).

Products are taken in the matrix's type, everything else in float32, or in float64 if the hidden states are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softshard.models.decoder import LogitTransform, LowRank

__all__ = ["ChunkLoss", "OutputLayer", "accumulation", "chunked_loss", "positions_with_weight"]

ChunkLoss = Callable[[Tensor, int, int], Tensor]
"""Returns the loss of the kept positions [start, stop) from their logits [c, V], which it replaces by their slopes."""


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """From hidden states to logits: z = transform(W h + b + B u) / temperature, for the first `num_valid` tokens; u and
    B are the features and the factor of a low-rank adapter, if there is one."""

    weight: Tensor
    """[V, d]"""
    bias: Tensor | None
    """[V]"""
    transform: LogitTransform
    temperature: float
    num_valid: int
    chunk_positions: int
    low_rank: LowRank | None = None
    """[N, r] features, [V, r] factor"""

    def check(self, hidden: Tensor) -> None:
        """Raise ValueError if sizes do not fit together."""
        if self.chunk_positions < 1:
            raise ValueError(f"chunk_positions is {self.chunk_positions}, it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, it must be above 0")
        if not 0 < self.num_valid <= len(self.weight):
            raise ValueError(f"num_valid is {self.num_valid}, the output matrix has {len(self.weight)} rows")
        if hidden.ndim != 2 or hidden.shape[1] != self.weight.shape[1]:
            sizes = f"hidden is {tuple(hidden.shape)}, weight {tuple(self.weight.shape)}"
            raise ValueError(f"{sizes}; their last sizes must agree")
        if self.low_rank is None:
            return
        features, factor = self.low_rank
        if len(features) != len(hidden) or len(factor) != len(self.weight) or features.shape[1:] != factor.shape[1:]:
            sizes = f"features are {tuple(features.shape)}, factor {tuple(factor.shape)}"
            raise ValueError(f"{sizes}; they must be [{len(hidden)}, r] and [{len(self.weight)}, r]")

    def buffers(self, num_positions: int, kind: torch.dtype) -> Buffers:
        """Memory for the chunks of `num_positions` positions."""
        size = (min(self.chunk_positions, num_positions), self.num_valid)
        capped, narrow = self.transform.soft_cap is not None, self.weight.dtype != kind
        device = self.weight.device
        return Buffers(
            logits=torch.empty(size, dtype=kind, device=device),
            product=torch.empty(size, dtype=self.weight.dtype, device=device) if narrow else None,
            tangents=torch.empty(size, dtype=kind, device=device) if capped else None,
        )

    def logits(self, hidden: Tensor, buffers: Buffers, features: Tensor | None = None) -> Tensor:
        """[c, num_valid] logits of a chunk's hidden states and features, in the buffer for logits."""
        logits, matrix = buffers.logits[: len(hidden)], self.weight[: self.num_valid].T
        hidden = hidden.to(self.weight.dtype)
        if buffers.product is None:
            torch.mm(hidden, matrix, out=logits)
        else:
            logits.copy_(torch.mm(hidden, matrix, out=buffers.product[: len(hidden)]))
        if self.bias is not None:
            logits.add_(self.bias[: self.num_valid])
        if features is not None and self.low_rank is not None:
            logits.addmm_(features.to(logits.dtype), self.low_rank.factor[: self.num_valid].T.to(logits.dtype))
        if buffers.tangents is not None and self.transform.soft_cap is not None:
            logits.mul_(self.transform.scale / self.transform.soft_cap).tanh_()
            buffers.tangents[: len(hidden)].copy_(logits)
            return logits.mul_(self.transform.soft_cap / self.temperature)
        return logits if self._factor == 1 else logits.mul_(self._factor)

    def to_product(self, slopes: Tensor, buffers: Buffers) -> Tensor:
        """Turn slopes against the logits into slopes against the product (including the adapter's part), in place. The
        logits must be the last ones that were computed in these buffers."""
        if buffers.tangents is not None:
            tangents = buffers.tangents[: len(slopes)]
            slopes.mul_(tangents.square_().neg_().add_(1))
        return slopes if self._factor == 1 else slopes.mul_(self._factor)

    @property
    def _factor(self) -> float:
        return self.transform.scale / self.temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Memory that all chunks reuse: allocating it for each chunk costs more than the arithmetic."""

    logits: Tensor
    """[c, num_valid]"""
    product: Tensor | None
    """[c, num_valid] in the matrix's type; None if that is the type of the logits."""
    tangents: Tensor | None
    """[c, num_valid] tanh of the capped logits; None without a cap."""


def chunked_loss(hidden: Tensor, output_layer: OutputLayer, loss: ChunkLoss, *, kept: Tensor | None) -> Tensor:
    """Summed loss of some positions, differentiable in hidden states, matrix, bias, and the adapter's two halves.

    `kept` [M] int64 are the positions that count, ascending; None: all. The others are never read or projected, and
    their gradient is 0.
    """
    inputs = (hidden, output_layer.weight, output_layer.bias, *(output_layer.low_rank or (None, None)))
    tracked = torch.is_grad_enabled()
    wanted = tuple(tracked and x is not None and x.requires_grad for x in inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _ChunkedLoss.apply
        return apply(*inputs, output_layer, loss, kept, wanted)


def positions_with_weight(weights: Tensor) -> Tensor | None:
    """[M] int64 positions whose weight is not 0; None if that is all of them."""
    kept = weights.nonzero()[:, 0]
    return None if len(kept) == len(weights) else kept


def accumulation(hidden: Tensor) -> torch.dtype:
    """Type of logits, losses and sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _ChunkedLoss(torch.autograd.Function):
    """A summed loss over an output layer, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        features: Tensor | None,
        factor: Tensor | None,
        output_layer: OutputLayer,
        chunk_loss: ChunkLoss,
        kept: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> Tensor:
        num, step = len(hidden) if kept is None else len(kept), output_layer.chunk_positions
        gradients = _Gradients.zeros(hidden, output_layer, wanted)
        buffers = output_layer.buffers(num, accumulation(hidden))
        loss = torch.zeros((), dtype=buffers.logits.dtype, device=hidden.device)
        for start in range(0, num, step):
            stop = min(start + step, num)
            rows: slice | Tensor = slice(start, stop) if kept is None else kept[start:stop]
            part, low = hidden[rows], None if features is None else features[rows]
            logits = output_layer.logits(part, buffers, low)
            loss += chunk_loss(logits, start, stop)
            if any(wanted):
                slopes = output_layer.to_product(logits, buffers)
                gradients.add_low_rank(slopes, low, rows)
                gradients.add(slopes, part, rows, buffers)
        ctx.save_for_backward(*gradients.of_their_types())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The scalar keeps its own precision in a product with a bfloat16 tensor; as bfloat16, 1/N would be off by up to
        # .4%.
        gradients = [None if saved is None else saved * grad_outputs[0] for saved in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """The requested gradients, summed over chunks."""

    hidden: Tensor | None
    weight: Tensor | None
    """In the type of sums: what one chunk adds to a bfloat16 gradient may be below its last bit."""
    bias: Tensor | None
    features: Tensor | None
    factor: Tensor | None
    output_layer: OutputLayer

    @classmethod
    def zeros(cls, hidden: Tensor, output_layer: OutputLayer, wanted: tuple[bool, ...]) -> _Gradients:
        kind, bias = accumulation(hidden), output_layer.bias
        features, factor = output_layer.low_rank or (None, None)
        return cls(
            hidden=torch.zeros_like(hidden) if wanted[0] else None,
            weight=torch.zeros_like(output_layer.weight, dtype=kind) if wanted[1] else None,
            bias=torch.zeros_like(bias, dtype=kind) if bias is not None and wanted[2] else None,
            features=torch.zeros_like(features) if features is not None and wanted[3] else None,
            factor=torch.zeros_like(factor, dtype=kind) if factor is not None and wanted[4] else None,
            output_layer=output_layer,
        )

    def add_low_rank(self, slopes: Tensor, features: Tensor | None, rows: slice | Tensor) -> None:
        """Add a chunk's gradients of the adapter's halves; `slopes` are against its products, `rows` its positions."""
        num_valid = self.output_layer.num_valid
        if self.features is not None and self.output_layer.low_rank is not None:
            factor = self.output_layer.low_rank.factor[:num_valid].to(slopes.dtype)
            self.features[rows] = (slopes @ factor).to(self.features.dtype)
        if self.factor is not None and features is not None:
            self.factor[:num_valid].addmm_(slopes.T, features.to(slopes.dtype))

    def add(self, slopes: Tensor, hidden: Tensor, rows: slice | Tensor, buffers: Buffers) -> None:
        """Add a chunk's other gradients; `slopes` are against its products, `hidden` its hidden states."""
        matrix, num_valid = self.output_layer.weight, self.output_layer.num_valid
        if self.bias is not None:
            self.bias[:num_valid] += slopes.sum(dim=0)
        if buffers.product is not None:
            slopes = buffers.product[: len(hidden)].copy_(slopes)
        if self.hidden is not None:
            self.hidden[rows] = (slopes @ matrix[:num_valid]).to(self.hidden.dtype)
        if self.weight is not None and self.weight.dtype == matrix.dtype:
            self.weight[:num_valid].addmm_(slopes.T, hidden)
        elif self.weight is not None:
            self.weight[:num_valid] += slopes.T @ hidden.to(matrix.dtype)

    def of_their_types(self) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, matrix, bias, features and factor, each in the type of its tensor."""
        output_layer = self.output_layer
        factor = None if output_layer.low_rank is None else output_layer.low_rank.factor
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(output_layer.weight.dtype),
            None if self.bias is None or output_layer.bias is None else self.bias.to(output_layer.bias.dtype),
            self.features,
            None if self.factor is None or factor is None else self.factor.to(factor.dtype),
        )
