"""The student's adapter, of any kind: attached, saved to bytes, loaded, merged.

In: a causal language model and the kind and shape of an adapter, or a saved adapter's folder. Out: the adapted model,
the adapter's files, or the model with the adapter merged into its weights. The same weights give the same bytes.

A kind is named in `config.AdapterKind`, and declared in one of two families, each with a file format: `lora` (peft's
own files, which other programs read) in its `PLACEMENTS`, `output` (softshard's own files) in its `OUTPUT_ADAPTERS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softshard.config import AdapterKind, LoraSettings
from softshard.finetune.adapters import lora, output
from softshard.finetune.adapters.output import OutputAdapted

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["attach_adapter", "load_adapter", "merge_adapter", "save_adapter"]


def attach_adapter(model: Any, kind: AdapterKind, shape: LoraSettings, *, seed: int) -> PeftModel | OutputAdapted:
    """Put a new adapter, which changes nothing yet, on a model in place; `unload()` of the result gives the model back.

    Raises:
        ModelInvalid: a module that is to be adapted does not exist.
    """
    if kind in output.OUTPUT_ADAPTERS:
        return output.attach_output(model, kind, shape, seed=seed)
    return lora.attach_lora(model, shape, seed=seed, placement=lora.PLACEMENTS[kind])


def save_adapter(model: PeftModel | OutputAdapted, *, base_model: str) -> dict[str, bytes]:
    """Content of the adapter's files by name; `base_model` is the base's name to write."""
    if isinstance(model, OutputAdapted):
        return output.save_output(model, base_model=base_model)
    return lora.save_adapter(model, base_model=base_model)


def load_adapter(model: Any, folder: Path, *, device: str) -> PeftModel | OutputAdapted:
    """A model with a saved adapter of any kind, frozen, in evaluation mode.

    Raises:
        AdapterMissing: the folder holds no adapter.
        ModelInvalid: the adapter cannot be read, or does not fit the model.
    """
    if (folder / output.CONFIG_FILE).is_file():
        return output.load_output(model, folder, device=device)
    return lora.load_adapter(model, folder, adapter_name="default", device=device)


def merge_adapter(model: PeftModel | OutputAdapted) -> Any:
    """The model with the adapter in its weights, in place; an output layer that changes is untied from the embedding.

    Raises:
        AdapterNotMergeable: no weights of the model's own shape give the adapter's logits.
    """
    if isinstance(model, OutputAdapted):
        return output.merge_output(model)
    inner = model.get_base_model()
    layer = inner.get_output_embeddings()
    if hasattr(layer, "get_base_layer"):
        output.untie_output(inner, layer.get_base_layer())
    return model.merge_and_unload()
