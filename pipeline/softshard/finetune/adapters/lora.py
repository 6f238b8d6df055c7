"""Low-rank adapters (LoRA) on a frozen model: attached, saved to bytes, loaded, named by digest.

In: a causal language model, or an adapter's folder. Out: a `PeftModel`, or the adapter's files in peft's own layout.
An adapter is float32 whatever the base's type; the same seed gives the same weights, and the same weights the same
bytes. `PLACEMENTS` lists the kinds.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from softshard.config import AdapterKind, LoraSettings
from softshard.errors import AdapterMissing, ModelInvalid
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.records.seeds import keyed_seed

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "CONFIG_FILE",
    "PLACEMENTS",
    "WEIGHTS_FILE",
    "Placement",
    "adapter_digest",
    "attach_lora",
    "load_adapter",
    "save_adapter",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class Placement(NamedTuple):
    """Which layers get an update."""

    decoder: bool
    """The linear layers of the decoder that the settings name."""
    output: bool
    """The output layer; a tied embedding stays as it is."""


PLACEMENTS: dict[AdapterKind, Placement] = {
    "lora": Placement(decoder=True, output=False),
    "lora_and_lm_head": Placement(decoder=True, output=True),
    "lm_head": Placement(decoder=False, output=True),
}


def attach_lora(model: Any, lora: LoraSettings, *, seed: int, placement: Placement = PLACEMENTS["lora"]) -> PeftModel:
    """Put a new adapter, which changes nothing yet, on a model in place; `unload()` of the result gives the model back.

    `all-linear` means every linear layer of the decoder (Conv1D counts), without the output layer. Layers of a vision
    or audio tower are never adapted. If `last_layers` exceeds the number of decoder layers, all of them are adapted.

    Raises:
        ModelInvalid: a module that `target_modules` names does not exist.
    """
    from peft import LoraConfig, get_peft_model

    linear = _linear_modules(model)
    names = sorted(linear) if lora.target_modules == "all-linear" else sorted(lora.target_modules)
    if missing := [name for name in names if name not in linear]:
        problem = f"has no linear layer named {missing[0]!r} to adapt; it has {', '.join(sorted(linear))}"
        raise ModelInvalid(model=str(model.name_or_path), problem=problem)
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    last = None if lora.last_layers is None else list(range(max(0, num_layers - lora.last_layers), num_layers))
    targets = names if placement.decoder else []
    if placement.output:
        head = _output_name(model)
        # peft would look for the number of a layer in the output layer's name too.
        of_last = [] if last is None else _names_in_layers(model, set(targets), set(last))
        targets, last = [*(targets if last is None else of_last), head], None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_outside_decoder(model, set(targets)),
        layers_to_transform=last,
        fan_in_fan_out=placement.decoder and any(_is_conv1d(linear[name]) for name in names),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        # peft draws from the generator of the CPU, on any device; torch.manual_seed would touch the others too.
        torch.default_generator.manual_seed(keyed_seed("softshard.lora", seed))
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def _linear_modules(model: Any) -> dict[str, nn.Module]:
    """A linear layer for each last part of a name in the decoder, to which the output layer does not belong."""
    return {
        name.rsplit(".", 1)[-1]: module
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }


def _output_name(model: Any) -> str:
    return _name_in(model, model.get_output_embeddings())


def _name_in(model: Any, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _names_in_layers(model: Any, last_parts: set[str], layers: set[int]) -> list[str]:
    """Full names of the linear layers of some layers of the decoder that end in one of some names."""
    found = []
    prefix = _name_in(model, model.get_decoder())
    for place, module in model.get_decoder().named_modules():
        name = f"{prefix}.{place}"
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        linear = isinstance(module, nn.Linear) or _is_conv1d(module)
        if linear and name.rsplit(".", 1)[-1] in last_parts and numbers and numbers[0] in layers:
            found.append(name)
    return found


def _outside_decoder(model: Any, targets: set[str]) -> str | None:
    """A pattern of the names of all modules outside the decoder but the output layer; None where no target is there."""
    prefix, output = f"{_name_in(model, model.get_decoder())}.", _output_name(model)
    outside = (
        name.rsplit(".", 1)[-1] in targets and (isinstance(module, nn.Linear) or _is_conv1d(module))
        for name, module in model.named_modules()
        if name != output and not name.startswith(prefix)
    )
    return rf"(?!{re.escape(prefix)}|{re.escape(output)}$).*" if any(outside) else None


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def save_adapter(model: PeftModel, *, adapter_name: str = "default", base_model: str | None = None) -> dict[str, bytes]:
    """Content of the adapter's files by name, as peft, transformers and vLLM read them.

    `base_model` is the base's name to write; without it, the one under which the base was loaded, which may be a folder
    of this machine.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = {**model.peft_config[adapter_name].to_dict(), "inference_mode": True}
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    text = json.dumps(config, default=_plain, sort_keys=True, indent=1, ensure_ascii=False)
    return {CONFIG_FILE: (text + "\n").encode(), WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}


def _plain(value: Any) -> Any:
    """Sets, which peft keeps names in, have no order of their own."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} in the adapter's config")


def adapter_digest(files: dict[str, bytes]) -> str:
    """SHA-256, in hex, of an adapter's files and their names."""
    return canonical_digest({name: sha256_hex(content) for name, content in files.items()})


def load_adapter(model: Any, folder: Path, *, adapter_name: str, device: str) -> PeftModel:
    """A model with a saved adapter, frozen and active; on a `PeftModel` it joins the adapters that are there.

    Raises:
        AdapterMissing: the folder holds no adapter.
        ModelInvalid: the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterMissing(uri=str(folder / name))
    try:
        saved = set(load_file(folder / WEIGHTS_FILE))
        # peft draws weights and then replaces them; its way around that, low_cpu_mem_usage, rounds a float32 adapter
        # to the type of a bfloat16 base.
        with torch.random.fork_rng(devices=[]):
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=adapter_name, torch_device=device)
                model.set_adapter(adapter_name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, torch_device=device)
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelInvalid(model=str(folder), problem=f"the adapter cannot be loaded: {error}") from error
    wanted = set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    if saved != wanted:
        problem = (
            f"is an adapter for another model: {len(saved ^ wanted)} of its weights have no place, or a place has none"
        )
        raise ModelInvalid(model=str(folder), problem=problem)
    model.requires_grad_(False)
    return model.eval()
