"""The state of a training that was stopped, in one object of a store.

In: plain values and tensors. Out: the same, or None where there is nothing, or nothing that is readable and of this
training, which then starts from the beginning. It is replaced whole, so that a kill while it is written leaves the one
before it; and it lies where the output lies, so that another machine can go on with the training.
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
    """Where the state of one training is kept."""

    store: Store
    path: str

    def write(self, state: dict[str, Any], *, identity: str) -> None:
        """Put the state of the training that `identity` names in place of what is there.

        Raises:
            StorageFull, StoreUnavailable: it cannot be kept.
        """
        content = io.BytesIO()
        torch.save({"version": _VERSION, "identity": identity, "state": state}, content)
        self.store.replace(self.path, content.getvalue())

    def read(self, *, identity: str) -> dict[str, Any] | None:
        """The saved state of the training that `identity` names, on the CPU; nothing in the file is executed."""
        try:
            saved = torch.load(io.BytesIO(self.store.read(self.path)), map_location="cpu", weights_only=True)
        except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError):
            return None
        if not isinstance(saved, dict) or (saved.get("version"), saved.get("identity")) != (_VERSION, identity):
            return None
        state: dict[str, Any] = saved["state"]
        return state

    def remove(self) -> None:
        """Forget it, once what was trained is saved."""
        self.store.remove(self.path)
