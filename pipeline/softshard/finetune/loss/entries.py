"""The entries of sparse targets, chunk by chunk of positions.

In: sparse targets of the positions of some hidden states. Out: for each chunk of positions, where its entries lie in
the logits, and their weights. Positions of weight 0 are left out here, so they are never projected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss.projection import OutputLayer, accumulation, positions_with_weight

__all__ = ["ChunkEntries", "ChunkedTargets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEntries:
    """Entries of the c positions of a chunk."""

    places: Tensor
    """[E] int64 indices into the flattened logits [c * num_valid]."""
    rows: Tensor
    """[E] int64 index of each entry's position in the chunk."""
    weights: Tensor
    """[E]"""
    in_head: Tensor | slice
    """[E] bool, entries whose token is not part of the ghost token; a slice of all where every entry is such."""
    ghost: Tensor
    """[c] mass of the ghost token, 0 without one."""
    scale: Tensor
    """[c] weights of the positions, times the square of the temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedTargets:
    """Targets of the M positions whose weight is not 0, in the type that sums are taken in."""

    targets: SparseTargets
    """Of the M positions."""
    counts: Tensor
    """[M] entries of each."""
    bounds: list[int]
    """[M + 1] `targets.entry_offsets` on the host."""
    scale: Tensor
    """[M] weights, times the square of the temperature."""
    kept: Tensor | None
    """[M] int64 indices of these positions; None: all positions."""

    @classmethod
    def of(cls, targets: SparseTargets, *, hidden: Tensor, output_layer: OutputLayer) -> ChunkedTargets:
        """Check that the targets fit the hidden states and the output layer.

        Raises:
            ValueError: sizes do not fit together, or an id is not below the output layer's `num_valid`.
        """
        output_layer.check(hidden)
        if len(targets.entry_offsets) != len(hidden) + 1:
            problem = f"{len(targets.entry_offsets)} offsets for {len(hidden)} positions"
            raise ValueError(f"{problem}, there must be one more than positions")
        if len(targets.entry_ids) and (highest := int(targets.entry_ids.max())) >= output_layer.num_valid:
            raise ValueError(f"entry id {highest} is not in the vocabulary of {output_layer.num_valid}")
        kind = accumulation(hidden)
        targets = replace(
            targets,
            entry_weights=targets.entry_weights.to(kind),
            tail_mass=None if targets.tail_mass is None else targets.tail_mass.to(kind),
            position_weights=targets.position_weights.to(kind),
        )
        if (kept := positions_with_weight(targets.position_weights)) is not None:
            targets = targets.select(kept)
        return cls(
            targets=targets,
            counts=targets.entry_offsets.diff(),
            bounds=targets.entry_offsets.tolist(),
            scale=targets.position_weights * output_layer.temperature**2,
            kept=kept,
        )

    def chunk(self, start: int, stop: int, *, num_valid: int) -> ChunkEntries:
        """Entries of positions [start, stop) of the M."""
        targets, entries = self.targets, slice(self.bounds[start], self.bounds[stop])
        rows = torch.repeat_interleave(self.counts[start:stop])
        scale = self.scale[start:stop]
        return ChunkEntries(
            places=rows * num_valid + targets.entry_ids[entries],
            rows=rows,
            weights=targets.entry_weights[entries],
            in_head=slice(None) if targets.entry_in_head is None else targets.entry_in_head[entries],
            ghost=torch.zeros_like(scale) if targets.tail_mass is None else targets.tail_mass[start:stop],
            scale=scale,
        )
