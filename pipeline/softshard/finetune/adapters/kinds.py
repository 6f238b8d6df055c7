"""The student's adapter, of whichever kind: attached, saved to bytes, loaded, merged.

In: a causal language model and the kind and shape of an adapter, or a saved adapter's folder. Out: the adapted model,
the adapter's files, or the model with the adapter merged into its weights. LoRA is peft's, in peft's own files, which
other programs read; `post_norm` and `correction` are softshard's own, in files of their own. The same weights give the
same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from softshard.config import AdapterKind, LoraSettings
from softshard.errors import AdapterMissing, AdapterNotMergeable, ModelInvalid
from softshard.finetune.adapters import lora
from softshard.finetune.adapters.output import OutputAdapted, OutputKind, attach_output

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["attach_adapter", "load_adapter", "merge_adapter", "save_adapter"]

_CONFIG_FILE = "output_adapter.json"
_WEIGHTS_FILE = "output_adapter.safetensors"
_ON_OUTPUT: dict[str, Literal["frozen", "also", "alone"]] = {
    "lora": "frozen",
    "lora_and_lm_head": "also",
    "lm_head": "alone",
}


class _SavedOutput(BaseModel):
    """`output_adapter.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OutputKind
    rank: int
    alpha: float
    base_model: str


def attach_adapter(model: Any, kind: AdapterKind, shape: LoraSettings, *, seed: int) -> PeftModel | OutputAdapted:
    """Put a new adapter, which changes nothing yet, on a model in place; `unload()` of the result gives the model back.

    Raises:
        ModelInvalid: a module that is to be adapted is not there.
    """
    if kind in ("post_norm", "correction"):
        return attach_output(model, kind, shape, seed=seed)
    return lora.attach_lora(model, shape, seed=seed, output=_ON_OUTPUT[kind])


def save_adapter(model: PeftModel | OutputAdapted, *, base_model: str) -> dict[str, bytes]:
    """Content of the adapter's files by name; `base_model` is the base's name to write."""
    from safetensors.torch import save

    if not isinstance(model, OutputAdapted):
        return lora.save_adapter(model, base_model=base_model)
    (adapter,) = model.adapter
    rank = len(adapter.down)
    saved = _SavedOutput(kind=adapter.kind, rank=rank, alpha=adapter.scale * rank, base_model=base_model)
    text = json.dumps(saved.model_dump(), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    tensors = {name: getattr(adapter, name).detach().cpu().contiguous() for name in ("down", "up")}
    return {_CONFIG_FILE: text.encode(), _WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}


def load_adapter(model: Any, folder: Path, *, device: str) -> PeftModel | OutputAdapted:
    """A model with a saved adapter of any kind, frozen, in evaluation mode.

    Raises:
        AdapterMissing: the folder holds no adapter.
        ModelInvalid: the adapter cannot be read, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / _CONFIG_FILE).is_file():
        return lora.load_adapter(model, folder, adapter_name="default", device=device)
    if not (folder / _WEIGHTS_FILE).is_file():
        raise AdapterMissing(uri=str(folder / _WEIGHTS_FILE))
    try:
        saved = _SavedOutput.model_validate_json((folder / _CONFIG_FILE).read_bytes())
        tensors = load_file(folder / _WEIGHTS_FILE, device=device)
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


def merge_adapter(model: PeftModel | OutputAdapted) -> Any:
    """The model with the adapter in its weights, in place; an output layer that changes is untied from the embedding.

    Raises:
        AdapterNotMergeable: no weights of the model's own shape give the adapter's logits.
    """
    inner = model.get_base_model()
    if not isinstance(model, OutputAdapted):
        output = inner.get_output_embeddings()
        if hasattr(output, "get_base_layer"):
            _untie(inner, output.get_base_layer())
        return model.merge_and_unload()
    (adapter,) = model.adapter
    try:
        weight = adapter.merged_weight()
    except ValueError as error:
        raise AdapterNotMergeable(kind=adapter.kind, reason=str(error)) from error
    layer = adapter.base_layer
    model.unload()
    _untie(inner, layer)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return inner


def _untie(model: Any, layer: nn.Linear) -> None:
    """Give the output layer a matrix of its own, in the config too, so that the embedding stays as it is."""
    if layer.weight is not model.get_input_embeddings().weight:
        return
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
