"""The model that computes the targets, its engine, and how it is adapted to the corpus."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from softshard.config.adapter import DataType, Device, LoraSettings, OptimizerSettings
from softshard.config.base import Settings

__all__ = ["ENGINE_NAMES", "EngineName", "TeacherSettings", "VllmSettings"]

EngineName = Literal["transformers", "vllm"]
"""The engines; `softshard.teacher.NAME_engine` is the module of each."""
ENGINE_NAMES: tuple[str, ...] = get_args(EngineName)


class VllmSettings(Settings):
    """How vLLM runs the teacher; only for `engine: vllm`. Every value is part of the parts' ids."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine; each layer is split over them."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1)
    """Share of a GPU's memory that the engine takes, including what the sketches need."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Size of the KV cache; without it, what `gpu_memory_utilization` leaves, and 1 on a CPU."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Most tokens of one step of the engine; a longer sequence is processed in pieces."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Most sequences of one step."""
    chunk_rows: int = Field(default=128, ge=1, le=8192)
    """Positions whose logits exist at one time."""
    enforce_eager: bool = True
    """Run the model without compiling it; false: vLLM compiles it first, which takes minutes."""
    own_process: bool = False
    """Run the engine in its own process instead of the worker's."""

    @model_validator(mode="after")
    def _consistent(self) -> VllmSettings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs"
                f" ({self.max_num_seqs})"
            )
        return self


class TeacherSettings(Settings):
    """The model that computes the targets, and how it is adapted to the corpus."""

    model: str = Field(min_length=1)
    """Folder or hub name (`name`, `owner/name`) of a causal language model."""
    revision: str | None = None
    """Revision on the hub."""
    engine: EngineName = "transformers"
    """What runs the model."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: DataType = "float32"
    """Type of weights and activations while scoring; `auto` is bfloat16 where the device has it natively."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads of one engine."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Token budget of a batch of the transformers engine, padding included."""
    vllm: VllmSettings = VllmSettings()
    """How vLLM runs it."""
    folds: int = Field(default=2, ge=0)
    """Number K of adapters, each trained on the documents outside its fold and then used to score the fold; 0: the
    model is not adapted."""
    lora: LoraSettings = LoraSettings()
    """Shape of the adapters."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How the adapters are trained."""
    training_dtype: DataType = "auto"
    """Type of the frozen weights while the adapters are trained."""
    retrain_growth: float = Field(default=0.1, ge=0)
    """An adapter is kept while everything that it was trained on is still in the corpus and outside its fold, and the
    text there has grown by at most this share; 0: until there is a new document."""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSettings:
        if self.folds == 1:
            raise ValueError("folds must be 0 or at least 2: with one fold no document is outside it")
        if self.engine == "vllm" and ":" in self.device:
            raise ValueError("the vllm engine takes its GPUs from CUDA_VISIBLE_DEVICES; give `device: cuda`")
        return self
