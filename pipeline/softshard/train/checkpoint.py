"""The state of a training that was stopped, in one file.

In: plain values and tensors. Out: the same, or None where there is no file, or none that is readable and of this
training, which then starts from the beginning. A file is replaced whole, so that a kill while it is written leaves the
one before it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from softshard.storage import LocalStore

__all__ = ["read_checkpoint", "write_checkpoint"]

_VERSION = 1


def write_checkpoint(path: Path, *, identity: str, state: dict[str, Any]) -> None:
    """Put the state of the training that `identity` names in the file's place. Raises StorageFull."""
    content = io.BytesIO()
    torch.save({"version": _VERSION, "identity": identity, "state": state}, content)
    LocalStore(path.parent).replace(path.name, content.getvalue())


def read_checkpoint(path: Path, *, identity: str) -> dict[str, Any] | None:
    """The saved state of the training that `identity` names, on the CPU; nothing in the file is executed."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError):
        return None
    if not isinstance(saved, dict) or (saved.get("version"), saved.get("identity")) != (_VERSION, identity):
        return None
    state: dict[str, Any] = saved["state"]
    return state
