"""The shape of an adapter, and its optimiser, for the style teacher and for the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from softshard.config.base import Settings

__all__ = [
    "ADAPTER_HELP",
    "DECODER_ADAPTERS",
    "AdapterKind",
    "DataType",
    "Device",
    "LoraSettings",
    "OptimizerSettings",
]


AdapterKind = Literal["lora", "lora_and_lm_head", "lm_head", "post_norm", "correction"]
"""Each kind has one entry in `finetune/adapters`: in `lora.PLACEMENTS` or in `output.OUTPUT_ADAPTERS`."""
ADAPTER_HELP: dict[AdapterKind, str] = {
    "lora": "on the linear layers of the decoder",
    "lora_and_lm_head": "on these and on the output layer",
    "lm_head": "on the output layer alone",
    "post_norm": "after the last norm, z = W (I + BA) h",
    "correction": "beside the output matrix, z = W h + U silu(D h), which cannot be merged into the model's weights",
}
"""Where the adapter of each kind is."""
DECODER_ADAPTERS: frozenset[AdapterKind] = frozenset(("lora", "lora_and_lm_head"))
"""Kinds that adapt layers of the decoder, so that `target_modules` and `last_layers` apply."""
DataType = Literal["auto", "float32", "bfloat16"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]


class LoraSettings(Settings):
    """A low-rank adapter (LoRA) on the linear layers of the decoder."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the update."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an update."""
    last_layers: int | None = Field(default=None, ge=1)
    """Adapt only this many of the last layers; the backward pass then ends there. Without it, all."""


class OptimizerSettings(Settings):
    """AdamW with a linear warm-up, then cosine decay to a tenth of the highest learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate. The default did best for a model of 135M parameters; larger models need smaller ones."""
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the data; fractions are allowed."""
    batch_tokens: int = Field(default=1024, ge=1)
    """Token budget of a batch, padding included; a longer sequence is a batch of its own."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints; a training that was stopped resumes from the last one."""
