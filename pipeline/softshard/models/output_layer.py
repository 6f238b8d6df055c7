"""An output layer as one matrix, its bias, and what an adapter on it adds; peft's wrappers are unwrapped.

In: the module that a model returns as its output layer. Out: the tensors with which the model's own logits can be
computed for some positions at a time, differentiable in all weights. A wrapper that has no such form is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from softshard.errors import ModelInvalid

__all__ = ["LowRank", "OutputParts", "lora_term", "model_name", "output_parts", "perturbed", "without_wrapper"]

_NOISE = 0.1
"""Standard deviation of what is added to an adapter's weights before a comparison with the model's own logits."""


class LowRank(NamedTuple):
    """The term `factor @ features` that an adapter of the output layer adds to its product."""

    features: Tensor
    """[..., r]"""
    factor: Tensor
    """[V, r]"""


class OutputParts(NamedTuple):
    """What an output layer multiplies hidden states with."""

    weight: Tensor
    """[V, d] with the rows that peft trains in their places."""
    bias: Tensor | None
    """[V]"""
    adapter: nn.Module | None
    """The LoRA layer or `OutputAdapter` around the linear layer; None without one."""


def without_wrapper(model: Any) -> Any:
    """The model of transformers inside a `PeftModel` or another adapted model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_name(model: Any) -> str:
    """The name of a model of transformers in an error: where it was loaded from, or its class."""
    return str(model.name_or_path) or type(model).__name__


def output_parts(layer: Any, *, model: str) -> OutputParts:
    """The parts of an output layer, plain or wrapped, as its adapters are active now.

    Raises:
        ModelInvalid: it is not a linear layer, or its adapter is of a kind that is not supported there; `model` is the
            name to say.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        copied = bool(active) and not layer.disable_adapters
        return output_parts(layer.modules_to_save[active[0]] if copied else layer.original_module, model=model)
    if isinstance(layer, TrainableTokensWrapper):
        tokens = layer.token_adapter
        active = tokens.active_adapters
        if tokens.disable_adapters or tokens.merged or not active:
            return output_parts(tokens.base_layer, model=model)
        return OutputParts(tokens.get_merged_weights(active), None, None)
    if isinstance(layer, BaseTunerLayer):
        if (problem := _problem_with(layer)) is not None:
            way_out = "use plain LoRA there, or take the output layer out of `target_modules`"
            raise ModelInvalid(model=model, problem=f"its output layer has {problem}; {way_out}")
        base = output_parts(layer.get_base_layer(), model=model)
        return base._replace(adapter=layer)
    adapter = layer if hasattr(layer, "adapted") else None
    linear = layer.base_layer if adapter is not None else layer
    if not isinstance(linear, nn.Linear):
        raise ModelInvalid(model=model, problem=f"its output layer is {type(linear).__name__}, it must be a linear one")
    return OutputParts(linear.weight, linear.bias, adapter)


def _problem_with(layer: Any) -> str | None:
    """What `lora_term` cannot express of a layer of peft; None if there is nothing."""
    from peft.tuners import lora

    if type(layer) is not lora.Linear:
        return f"an adapter of the kind {type(layer).__module__.split('.')[-2]}"
    for name in layer.active_adapters:
        if layer.use_dora.get(name):
            return "a LoRA with `use_dora`"
        if name in layer.lora_variant:
            return f"a LoRA of the variant {type(layer.lora_variant[name]).__name__}"
        if layer.lora_bias.get(name):
            return "a LoRA with `lora_bias`"
    return None


def lora_term(layer: Any, states: Tensor) -> LowRank | None:
    """The term that the active adapters of a LoRA layer of peft add; None where there is none, or it is merged."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return None
    parts = []
    for name in names:
        first = layer.lora_A[name]
        features = first(layer.lora_dropout[name](states.to(first.weight.dtype))) * layer.scaling[name]
        parts.append(LowRank(features, layer.lora_B[name].weight))
    if len(parts) == 1:
        return parts[0]
    features, factors = zip(*parts, strict=True)
    return LowRank(torch.cat(features, dim=-1), torch.cat(factors, dim=-1))


@contextlib.contextmanager
def perturbed(layer: nn.Module, *, but: tuple[Tensor | None, ...]) -> Iterator[None]:
    """Within the block, all weights of an output layer but these have noise added.

    A new adapter changes nothing, so that leaving it out would not be seen. No global generator is used.
    """
    generator = torch.Generator().manual_seed(0)
    kept = {id(tensor) for tensor in but}
    saved = [(item, item.detach().clone()) for item in layer.parameters() if id(item) not in kept]
    with torch.no_grad():
        for item, _ in saved:
            item.add_((torch.randn(item.shape, generator=generator) * _NOISE).to(item))
    try:
        yield
    finally:
        with torch.no_grad():
            for item, before in saved:
                item.copy_(before)
