"""Where a model computes, in which type, and what to do when its memory runs out."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from softshard.config import DataType

__all__ = ["out_of_memory", "release_memory", "resolve_device", "resolve_dtype"]


def resolve_device(device: str) -> str:
    """`auto` is `cuda` where torch sees one, else `cpu`; anything else is kept."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: DataType, *, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively (on a CPU: AVX-512 BF16), else float32."""
    import torch

    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _cpu_has_bf16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's; torch tells the latter by the text of a RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory(device: str) -> None:
    """Give back to a device what nothing refers to any more; torch keeps it for this process otherwise."""
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
