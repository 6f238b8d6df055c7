"""Loads a model folder as a frozen causal language model on a device, or without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softshard.errors import DeviceFailed, ModelInvalid
from softshard.models.device import device_failed, out_of_memory
from softshard.models.folder import check_weights, read_config

if TYPE_CHECKING:
    import torch

__all__ = ["expert_share", "load_empty_model", "load_model"]


def load_empty_model(folder: Path) -> Any:
    """The modules of a causal language model without their weights, which takes no memory to speak of.

    Raises:
        ModelInvalid: the folder's config is not one of a causal language model.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = read_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = f"is of the kind {config.model_type!r}, which is no causal language model; use another model"
        raise ModelInvalid(model=str(folder), problem=problem)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelInvalid(model=str(folder), problem=f"cannot be loaded: {error}") from error
    if getattr(model.config, "is_decoder", True) is False:
        problem = f"is of the kind {config.model_type!r} and sees the tokens that it should predict; use another model"
        raise ModelInvalid(model=str(folder), problem=problem)
    model.name_or_path = str(folder)
    return model


def expert_share(model: Any) -> float:
    """Share of a model's weights that are experts in tensors of all experts of a layer, which no linear layer holds.

    The model may be without its weights, but has no adapter yet.
    """
    weights = dict(model.named_parameters())
    experts = (weight.numel() for name, weight in weights.items() if ".experts." in name and weight.ndim == 3)
    return float(sum(experts) / sum(weight.numel() for weight in weights.values()))


def load_model(folder: Path, *, dtype: torch.dtype, device: str) -> Any:
    """A frozen causal language model in evaluation mode.

    Raises:
        ModelInvalid: transformers cannot load it, or there is no such device.
        DeviceFailed: the device cannot be used.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_weights(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise ModelInvalid(model=str(folder), problem=f"cannot be loaded: {error}") from error
    model.requires_grad_(False)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        if device_failed(error):
            raise DeviceFailed(device=device, problem=str(error)) from error
        raise ModelInvalid(
            model=str(folder), problem=f"cannot be put on the device {device} ({error}); set `device: auto`"
        ) from error
