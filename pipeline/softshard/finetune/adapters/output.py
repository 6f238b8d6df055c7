"""Adapters of the output layer that peft has not: after the last norm, and beside the output matrix.

In: a causal language model with a linear output layer, W. Out: the same model with another module in that place, whose
adapter changes nothing yet. With h the body's last hidden state (its norm included) and s = alpha / rank:

    post_norm    z = W (h + s B A h)            a LoRA (2106.09685, section 4.1) of the identity before W
    correction   z = W h + s U silu(D h)        an adapter (1902.00751, section 2.1: down, nonlinearity, up, skip) whose
                                                way up ends in the vocabulary and whose skip connection is W; with the
                                                nonlinearity of Medusa's heads (2401.10774, section 2.1.1)

The first is linear, so that W (I + s B A) is the merged matrix; the second is not, and cannot be merged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softshard.config import LoraSettings
from softshard.models.decoder import LowRank
from softshard.records.seeds import keyed_seed

__all__ = ["OutputAdapted", "OutputAdapter", "OutputKind", "attach_output"]

OutputKind = Literal["post_norm", "correction"]


class OutputAdapter(nn.Module):
    """Stands where the output layer stood and adapts it; `enabled` is False while the base is asked for.

    Both kinds go down to [rank] and up again, from a first matrix that is random and a second that is 0, in float32.
    """

    def __init__(self, layer: nn.Linear, *, kind: OutputKind, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.kind, self.scale, self.enabled = kind, alpha / rank, True
        self.base_layer = layer
        width = layer.in_features if kind == "post_norm" else layer.out_features
        device = layer.weight.device
        self.down = nn.Parameter(torch.empty((rank, layer.in_features), dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros((width, rank), dtype=torch.float32, device=device))
        self.adapter_dropout = nn.Dropout(dropout)

    def get_base_layer(self) -> nn.Linear:
        """The output layer itself."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """[V, d] the output matrix, which models ask their output layer for."""
        return self.base_layer.weight

    def adapted(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """[..., d] what the output matrix is multiplied with, and what is added to the product."""
        if not self.enabled:
            return states, None
        wide = states.to(self.down.dtype)
        low = nn.functional.linear(self.adapter_dropout(wide), self.down)
        if self.kind == "post_norm":
            return wide + self.scale * nn.functional.linear(low, self.up), None
        return states, LowRank(self.scale * nn.functional.silu(low), self.up)

    def forward(self, states: Tensor) -> Tensor:
        """[..., V] the product, of the output layer's type."""
        states, low_rank = self.adapted(states)
        product: Tensor = self.base_layer(states.to(self.base_layer.weight.dtype))
        return product if low_rank is None else product + nn.functional.linear(*low_rank).to(product.dtype)

    def merged_weight(self) -> Tensor:
        """[V, d] output matrix that gives the same logits without the adapter, of the output layer's type.

        Raises:
            ValueError: no matrix does, since the adapter is not linear.
        """
        if self.kind != "post_norm":
            raise ValueError("a correction head is not linear in the hidden state: no output matrix stands for it")
        weight = self.base_layer.weight
        return (weight.double() + self.scale * (weight.double() @ self.up.double()) @ self.down.double()).to(
            weight.dtype
        )


class OutputAdapted(nn.Module):
    """A model with an `OutputAdapter`, used as a `PeftModel` is."""

    def __init__(self, model: Any, adapter: OutputAdapter) -> None:
        super().__init__()
        self.model = model
        self.adapter = [adapter]
        """In a list, so that its weights are named once, in their place in the model."""
        model.set_output_embeddings(adapter)

    @property
    def config(self) -> Any:
        """The model's own."""
        return self.model.config

    def get_base_model(self) -> Any:
        """The model, its adapter in place."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, for as long as this lasts."""
        (adapter,) = self.adapter
        adapter.enabled = False
        try:
            yield
        finally:
            adapter.enabled = True

    def unload(self) -> Any:
        """The base model, as it was."""
        (adapter,) = self.adapter
        self.model.set_output_embeddings(adapter.base_layer)
        return self.model


def attach_output(model: Any, kind: OutputKind, shape: LoraSettings, *, seed: int) -> OutputAdapted:
    """Put a new adapter, which changes nothing yet, on a model's output layer, in place.

    The first matrix is drawn as peft draws LoRA's (uniform, of Kaiming's bound with a = sqrt 5).
    """
    model.requires_grad_(False)
    layer = model.get_output_embeddings()
    adapter = OutputAdapter(layer, kind=kind, rank=shape.rank, alpha=shape.alpha, dropout=shape.dropout)
    generator = torch.Generator().manual_seed(keyed_seed(f"softshard.{kind}", seed))
    bound = math.sqrt(1 / layer.in_features)
    first = torch.rand(adapter.down.shape, generator=generator) * (2 * bound) - bound
    with torch.no_grad():
        adapter.down.copy_(first)
    return OutputAdapted(model, adapter)
