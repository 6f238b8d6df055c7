"""The state of a stopped training, in one object of a store.

In: plain values and tensors. Out: the same, or None if there is no readable state of this training, which then starts
from the beginning. The object is replaced as a whole, so a process killed while writing leaves the previous state. It
is in the output's own store, so another machine can continue the training.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from softshard.storage import Store

__all__ = ["Checkpoint"]

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The object that holds the state of one training."""

    store: Store
    path: str

    def write(self, state: dict[str, Any], *, identity: str) -> None:
        """Replace the stored state by that of the training with this identity.

        Raises:
            StorageFull, StoreUnavailable: it cannot be written.
        """
        content = io.BytesIO()
        torch.save({"version": _VERSION, "identity": identity, "state": state}, content)
        self.store.replace(self.path, content.getvalue())

    def read(self, *, identity: str) -> dict[str, Any] | None:
        """The saved state of the training with this identity, on the CPU; no code in the file is executed."""
        try:
            saved = torch.load(io.BytesIO(self.store.read(self.path)), map_location="cpu", weights_only=True)
        except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError):
            return None
        if not isinstance(saved, dict) or (saved.get("version"), saved.get("identity")) != (_VERSION, identity):
            return None
        state: dict[str, Any] = saved["state"]
        return state

    def remove(self) -> None:
        """Remove the state, once the adapter is saved."""
        self.store.remove(self.path)
