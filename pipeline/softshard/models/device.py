"""The device and the type that a model computes with, and memory that runs out."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from softshard.errors import DeviceMissing

if TYPE_CHECKING:
    import torch

    from softshard.config import DataType

__all__ = [
    "check_device",
    "device_failed",
    "out_of_memory",
    "peak_memory",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
]


_SIGNS_OF_A_DEVICE = ("CUDA error", "CUDA driver", "CUDA GPUs", "NVIDIA driver", "CUBLAS_STATUS", "cuDNN", "NCCL")


def resolve_device(device: str) -> str:
    """`auto` is `cuda` where torch sees a GPU, else `cpu`; any other name is returned unchanged."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str, *, setting: str) -> None:
    """Refuse a CUDA device that torch does not see here. Raises DeviceMissing, which names the `setting`."""
    import torch

    kind, _, index = device.partition(":")
    num_devices = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= num_devices:
        raise DeviceMissing(setting=setting, device=device, num_devices=num_devices)


def resolve_dtype(dtype: DataType, *, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the device has it natively (on a CPU: AVX-512 BF16 or AMX), else float32."""
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
    """Whether memory of a device or of the machine ran out; torch reports the latter only in a RuntimeError's text."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def device_failed(error: BaseException) -> bool:
    """Whether a device, its driver or a link between devices failed; torch says most of it in a RuntimeError's text."""
    import torch

    said = str(error)
    named = isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS_OF_A_DEVICE)
    return not out_of_memory(error) and (isinstance(error, torch.AcceleratorError) or named)


def peak_memory(device: str) -> int | None:
    """Most bytes that this process's tensors had on a CUDA device so far; None for other devices, or without any."""
    import torch

    device = resolve_device(device)
    return (torch.cuda.max_memory_allocated(device) or None) if device.startswith("cuda") else None


def release_memory(device: str) -> None:
    """Return a device's unreferenced memory, which torch otherwise keeps for this process."""
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
