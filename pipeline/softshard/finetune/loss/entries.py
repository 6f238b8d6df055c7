"""Sparse targets of many positions, checked, and their entries chunk by chunk.

In: entries as a batch holds them. Out: for a chunk of positions, where its entries lie in the logits and what they
weigh. Positions of weight 0 are left out here, and so are never projected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.finetune.loss.projection import Readout, accumulation, positions_with_weight

__all__ = ["ChunkEntries", "SparseTarget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEntries:
    """Entries of c positions."""

    places: Tensor
    """[E] int64, in the flattened logits [c * num_valid]."""
    rows: Tensor
    """[E] int64"""
    weights: Tensor
    """[E]"""
    in_head: Tensor | slice
    """Those that the ghost token does not stand for: [E] bool, or all."""
    ghost: Tensor
    """[c] mass of the ghost token, 0 without one."""
    scale: Tensor
    """[c] weights of the positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTarget:
    """Entries of the M positions whose weight is not 0."""

    ids: Tensor
    weights: Tensor
    counts: Tensor
    bounds: list[int]
    tail: Tensor | None
    in_head: Tensor | None
    positions: Tensor
    """[M] weights."""
    kept: Tensor | None
    """[M] which positions these are; None: all."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        readout: Readout,
        *,
        entry_ids: Tensor,
        entry_weights: Tensor,
        entry_offsets: Tensor,
        tail_mass: Tensor | None,
        entry_in_head: Tensor | None,
        position_weights: Tensor | None,
    ) -> SparseTarget:
        """The target of `hidden`'s positions; every position's weight is times the square of the temperature.

        Raises:
            ValueError: sizes that do not fit together, or an id that is not below the readout's `num_valid`.
        """
        readout.check(hidden)
        if len(entry_offsets) != len(hidden) + 1:
            problem = f"{len(entry_offsets)} offsets for {len(hidden)} positions"
            raise ValueError(f"{problem}, there must be one more than positions")
        if len(entry_ids) and (highest := int(entry_ids.max())) >= readout.num_valid:
            raise ValueError(f"entry id {highest} is not in the vocabulary of {readout.num_valid}")
        kind, kept = accumulation(hidden), None
        positions = torch.ones(len(hidden), dtype=kind, device=hidden.device)
        if position_weights is not None:
            positions = position_weights.to(kind)
            kept = positions_with_weight(positions)
        target = cls(
            ids=entry_ids,
            weights=entry_weights.to(kind),
            counts=entry_offsets.diff(),
            bounds=entry_offsets.tolist(),
            tail=None if tail_mass is None else tail_mass.to(kind),
            in_head=entry_in_head,
            positions=positions * readout.temperature**2,
            kept=kept,
        )
        return target if kept is None else target._only(kept)

    def _only(self, kept: Tensor) -> SparseTarget:
        of_kept = torch.zeros(len(self.counts), dtype=torch.bool, device=kept.device)
        of_kept[kept] = True
        entries = of_kept.repeat_interleave(self.counts)
        counts = self.counts[kept]
        return SparseTarget(
            ids=self.ids[entries],
            weights=self.weights[entries],
            counts=counts,
            bounds=[0, *counts.cumsum(0).tolist()],
            tail=None if self.tail is None else self.tail[kept],
            in_head=None if self.in_head is None else self.in_head[entries],
            positions=self.positions[kept],
            kept=kept,
        )

    def chunk(self, start: int, stop: int, *, num_valid: int) -> ChunkEntries:
        """Entries of positions [start, stop) of the M."""
        entries = slice(self.bounds[start], self.bounds[stop])
        rows = torch.repeat_interleave(self.counts[start:stop])
        scale = self.positions[start:stop]
        return ChunkEntries(
            places=rows * num_valid + self.ids[entries],
            rows=rows,
            weights=self.weights[entries],
            in_head=slice(None) if self.in_head is None else self.in_head[entries],
            ghost=torch.zeros_like(scale) if self.tail is None else self.tail[start:stop],
            scale=scale,
        )
