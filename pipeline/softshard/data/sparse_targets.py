"""The sparse targets of a batch's labels: one value that batches hold and losses, objectives and trainers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["SparseTargets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """Distributions over the vocabulary for N labels, as E (token, weight) entries.

    The weights of a label need not sum to 1: those of a sampled sketch do so only in expectation.
    """

    entry_ids: Tensor
    """[E] int64; label n has entries entry_offsets[n]:entry_offsets[n + 1]. An id may occur twice: its weights add."""
    entry_weights: Tensor
    """[E] float32."""
    entry_offsets: Tensor
    """[N + 1] int64."""
    entry_in_head: Tensor | None = None
    """[E] bool: False for entries whose token may also be part of the ghost token, such as the label's own token;
    None: all True."""
    tail_mass: Tensor | None = None
    """[N] float32 mass of the ghost token, which is all tokens outside the head together; None: no ghost token."""
    position_weights: Tensor
    """[N] float32 weights of the labels in the loss; labels of weight 0 cost nothing."""
    counted: Tensor | None = None
    """[N] float32 weights by which the mean over labels is taken, where they are not `position_weights`. The weight of
    a group changes its share of the data set but not of a batch that holds that group alone, so it is left out here."""

    @property
    def mean_weights(self) -> Tensor:
        """[N] weights by which a mean over labels is taken."""
        return self.position_weights if self.counted is None else self.counted

    @property
    def mean_divisor(self) -> Tensor:
        """Scalar that turns a sum over labels into their mean: the sum of `mean_weights`, or 1 where that is 0."""
        total = self.mean_weights.sum()
        return torch.where(total > 0, total, 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that are None left out: Trainer and accelerate move mappings of tensors only."""
        named = {name: getattr(self, name) for name in _NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Any]) -> SparseTargets:
        """The inverse of `tensors`; other names in the mapping are ignored."""
        return cls(**{name: named[name] for name in _NAMES if named.get(name) is not None})

    def select(self, labels: Tensor) -> SparseTargets:
        """The targets of some labels, given as [M] int64 indices in ascending order."""
        counts = self.entry_offsets.diff()
        chosen = torch.zeros(len(counts), dtype=torch.bool, device=labels.device)
        chosen[labels] = True
        entries = chosen.repeat_interleave(counts)
        return SparseTargets(
            entry_ids=self.entry_ids[entries],
            entry_weights=self.entry_weights[entries],
            entry_offsets=torch.nn.functional.pad(counts[labels].cumsum(0), (1, 0)),
            entry_in_head=None if self.entry_in_head is None else self.entry_in_head[entries],
            tail_mass=None if self.tail_mass is None else self.tail_mass[labels],
            position_weights=self.position_weights[labels],
            counted=None if self.counted is None else self.counted[labels],
        )

    def without_weight(self) -> SparseTargets:
        """The same targets with weights of zero."""
        return replace(self, position_weights=torch.zeros_like(self.position_weights), counted=None)

    def to(self, device: str | torch.device) -> SparseTargets:
        """The targets on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device))

    def pin_memory(self) -> SparseTargets:
        """The targets in page-locked memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        return SparseTargets(**{name: change(tensor) for name, tensor in self.tensors().items()})


_NAMES = tuple(field.name for field in fields(SparseTargets))
