"""Loads a model folder as a frozen causal language model on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softshard.errors import ModelInvalid
from softshard.models.device import out_of_memory
from softshard.models.folder import check_weights

if TYPE_CHECKING:
    import torch

__all__ = ["load_model"]


def load_model(folder: Path, *, dtype: torch.dtype, device: str) -> Any:
    """A frozen causal language model in evaluation mode.

    Raises:
        ModelInvalid: transformers cannot load it, or there is no such device.
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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise ModelInvalid(model=str(folder), problem=f"cannot be loaded: {error}") from error
    model.requires_grad_(False)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise ModelInvalid(
            model=str(folder), problem=f"cannot be put on the device {device} ({error}); set `device: auto`"
        ) from error
