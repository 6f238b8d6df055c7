"""Adapters of the output layer that peft does not have: after the last norm, and beside the output matrix.

In: a causal language model with a linear output layer W, or the folder of a saved adapter. Out: the same model with an
adapter module in the place of that layer, the adapter's files, or the model with the adapter merged into W. With h the
body's last hidden state (its norm included) and s = alpha / rank:

    post_norm    z = W (h + s B A h)            a LoRA (2106.09685, section 4.1) of the identity before W
    correction   z = W h + s U silu(D h)        an adapter (1902.00751, section 2.1: down, nonlinearity, up, skip) whose
                                                up-projection ends in the vocabulary and whose skip connection is W;
                                                the nonlinearity is that of Medusa's heads (2401.10774, section 2.1.1)

The first is linear, so W (I + s B A) is the merged matrix; the second is not linear and cannot be merged. A kind is one
subclass of `OutputAdapter`, listed in `OUTPUT_ADAPTERS`.
"""

from __future__ import annotations

import contextlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor, nn

from softshard.config import AdapterKind, LoraSettings
from softshard.errors import AdapterMissing, AdapterNotMergeable, ModelInvalid
from softshard.models.decoder import LowRank
from softshard.records.seeds import keyed_seed

__all__ = [
    "CONFIG_FILE",
    "OUTPUT_ADAPTERS",
    "OutputAdapted",
    "OutputAdapter",
    "attach_output",
    "load_output",
    "merge_output",
    "save_output",
    "untie_output",
]

CONFIG_FILE = "output_adapter.json"
WEIGHTS_FILE = "output_adapter.safetensors"


class OutputAdapter(nn.Module):
    """Replaces the output layer and adapts it; while `enabled` is False it behaves as the layer itself.

    Every kind projects down to [rank] and up again, in float32. The first matrix is random and the second is 0, so that
    a new adapter changes nothing.
    """

    kind: ClassVar[AdapterKind]

    def __init__(self, layer: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.enabled = alpha / rank, True
        self.base_layer = layer
        device = layer.weight.device
        self.down = nn.Parameter(torch.empty((rank, layer.in_features), dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros((self.width(layer), rank), dtype=torch.float32, device=device))
        self.adapter_dropout = nn.Dropout(dropout)

    @staticmethod
    @abstractmethod
    def width(layer: nn.Linear) -> int:
        """Size of what the second matrix gives."""

    @abstractmethod
    def adapt(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """As `adapted`, of an adapter that is enabled."""

    def merged_weight(self) -> Tensor:
        """[V, d] output matrix that gives the same logits without the adapter, of the output layer's type.

        Raises:
            AdapterNotMergeable: the adapter is not linear, so no matrix does.
        """
        reason = f"a {self.kind} head is not linear in the hidden state: no output matrix gives its logits"
        raise AdapterNotMergeable(kind=self.kind, reason=reason)

    def get_base_layer(self) -> nn.Linear:
        """The output layer itself."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """[V, d] the output matrix, which models ask their output layer for."""
        return self.base_layer.weight

    def adapted(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """[..., d] states to multiply with the output matrix, and what to add to that product."""
        return self.adapt(states) if self.enabled else (states, None)

    def forward(self, states: Tensor) -> Tensor:
        """[..., V] the product, of the output layer's type."""
        states, low_rank = self.adapted(states)
        product: Tensor = self.base_layer(states.to(self.base_layer.weight.dtype))
        return product if low_rank is None else product + nn.functional.linear(*low_rank).to(product.dtype)

    def _low(self, wide: Tensor) -> Tensor:
        """[..., rank] the down-projection of float32 states."""
        return nn.functional.linear(self.adapter_dropout(wide), self.down)


class PostNormAdapter(OutputAdapter):
    """z = W (h + s B A h)."""

    kind = "post_norm"

    @staticmethod
    def width(layer: nn.Linear) -> int:
        """The hidden size."""
        return layer.in_features

    def adapt(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """h + s B A h in float32, and nothing to add."""
        wide = states.to(self.down.dtype)
        return wide + self.scale * nn.functional.linear(self._low(wide), self.up), None

    def merged_weight(self) -> Tensor:
        """[V, d] W (I + s B A), computed in float64."""
        weight = self.base_layer.weight
        merged = weight.double() + self.scale * (weight.double() @ self.up.double()) @ self.down.double()
        return merged.to(weight.dtype)


class CorrectionAdapter(OutputAdapter):
    """z = W h + s U silu(D h)."""

    kind = "correction"

    @staticmethod
    def width(layer: nn.Linear) -> int:
        """The vocabulary."""
        return layer.out_features

    def adapt(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """h, and s silu(D h) with U to add to its product."""
        return states, LowRank(self.scale * nn.functional.silu(self._low(states.to(self.down.dtype))), self.up)


OUTPUT_ADAPTERS: dict[AdapterKind, type[OutputAdapter]] = {
    adapter.kind: adapter for adapter in (PostNormAdapter, CorrectionAdapter)
}


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
        """The base model within the context."""
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


def attach_output(model: Any, kind: AdapterKind, shape: LoraSettings, *, seed: int) -> OutputAdapted:
    """Put a new adapter, which changes nothing yet, on a model's output layer, in place.

    The first matrix is drawn as peft draws LoRA's (uniform, with Kaiming's bound for a = sqrt 5).
    """
    model.requires_grad_(False)
    layer = model.get_output_embeddings()
    adapter = OUTPUT_ADAPTERS[kind](layer, rank=shape.rank, alpha=shape.alpha, dropout=shape.dropout)
    generator = torch.Generator().manual_seed(keyed_seed(f"softshard.{kind}", seed))
    bound = math.sqrt(1 / layer.in_features)
    first = torch.rand(adapter.down.shape, generator=generator) * (2 * bound) - bound
    with torch.no_grad():
        adapter.down.copy_(first)
    return OutputAdapted(model, adapter)


class _SavedOutput(BaseModel):
    """`output_adapter.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: AdapterKind
    rank: int
    alpha: float
    base_model: str

    @field_validator("kind")
    @classmethod
    def _is_of_this_format(cls, kind: AdapterKind) -> AdapterKind:
        if kind not in OUTPUT_ADAPTERS:
            raise ValueError(f"kind is {kind!r}, it must be one of {', '.join(OUTPUT_ADAPTERS)}")
        return kind


def save_output(model: OutputAdapted, *, base_model: str) -> dict[str, bytes]:
    """Content of the adapter's files by name."""
    from safetensors.torch import save

    (adapter,) = model.adapter
    rank = len(adapter.down)
    saved = _SavedOutput(kind=adapter.kind, rank=rank, alpha=adapter.scale * rank, base_model=base_model)
    text = json.dumps(saved.model_dump(), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    tensors = {name: getattr(adapter, name).detach().cpu().contiguous() for name in ("down", "up")}
    return {CONFIG_FILE: text.encode(), WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}


def load_output(model: Any, folder: Path, *, device: str) -> OutputAdapted:
    """A model with a saved adapter, frozen, in evaluation mode.

    Raises:
        AdapterMissing: a file of the adapter is missing.
        ModelInvalid: the adapter cannot be read, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterMissing(uri=str(folder / WEIGHTS_FILE))
    try:
        saved = _SavedOutput.model_validate_json((folder / CONFIG_FILE).read_bytes())
        tensors = load_file(folder / WEIGHTS_FILE, device=device)
        down, up = tensors["down"], tensors["up"]
    except (ValidationError, SafetensorError, KeyError) as error:
        raise ModelInvalid(model=str(folder), problem=f"the adapter cannot be loaded: {error}") from error
    adapted = attach_output(model, saved.kind, LoraSettings(rank=saved.rank, alpha=saved.alpha), seed=0)
    (adapter,) = adapted.adapter
    if (down.shape, up.shape) != (adapter.down.shape, adapter.up.shape):
        adapted.unload()
        sizes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        wanted = f"{tuple(adapter.down.shape)} and {tuple(adapter.up.shape)}"
        raise ModelInvalid(model=str(folder), problem=f"is an adapter for another model: {sizes}, it needs {wanted}")
    with torch.no_grad():
        adapter.down.copy_(down)
        adapter.up.copy_(up)
    adapted.requires_grad_(False)
    return adapted.eval()


def merge_output(model: OutputAdapted) -> Any:
    """The model with the adapter in its output matrix, in place, untied from the embedding.

    Raises:
        AdapterNotMergeable: the adapter is not linear.
    """
    (adapter,) = model.adapter
    weight, layer = adapter.merged_weight(), adapter.base_layer
    inner = model.unload()
    untie_output(inner, layer)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return inner


def untie_output(model: Any, layer: nn.Linear) -> None:
    """Give the output layer a matrix of its own, in the config too, so that the embedding stays as it is."""
    if layer.weight is not model.get_input_embeddings().weight:
        return
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
