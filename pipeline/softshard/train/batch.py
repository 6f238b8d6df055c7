"""Rows of parts, or plain sequences, to the tensors of a training step.

In: sequences with their stored targets, or sequences alone. Out: a `Batch`, in which the label's own token is mixed
into the stored target: P_hat = alpha * delta(label) + (1 - alpha) * sketch. Nothing is recomputed for another alpha;
alpha = 1 is cross-entropy on the corpus's own tokens, and the sketch is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.shard.read import Row
from softshard.shard.schema import PartMetadata
from softshard.target.codec import offsets_of
from softshard.target.entries import Entries, entries_of
from softshard.target.join import concatenate
from softshard.target.types import TokenSequence

__all__ = ["Batch", "collate", "collate_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B sequences padded to L tokens, and the targets of their N labels, in the order of the sequences."""

    input_ids: Tensor
    """[B, L] int64, padded on the right with 0."""
    attention_mask: Tensor
    """[B, L] int64, 0 on padding."""
    positions: Tensor
    """[N] int64, b * L + t of the position before each label, whose logits are compared with the target."""
    labels: Tensor
    """[N] int64 ids of the labels."""
    entry_ids: Tensor
    """[E] int64; those of label n lie at entry_offsets[n]:entry_offsets[n + 1], and one id may be there twice."""
    entry_weights: Tensor
    """[E] float32."""
    entry_offsets: Tensor
    """[N + 1] int64."""
    entry_in_head: Tensor | None
    """[E] bool, entries that the ghost token does not stand for; None without a ghost token."""
    tail_mass: Tensor | None
    """[N] float32 mass of the ghost token; None without one."""
    position_weights: Tensor
    """[N] float32."""
    num_tokens: int
    """Tokens without padding; 0 in a batch of weight zero."""

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: item.to(device) for name, item in values.items() if isinstance(item, Tensor)}
        return replace(self, **moved)

    def without_weight(self) -> Batch:
        """The same batch with weights of zero, for a rank that has none of its own in the last round of an epoch."""
        return replace(self, position_weights=torch.zeros_like(self.position_weights), num_tokens=0)


def collate(
    rows: Sequence[Row],
    *,
    metadata: PartMetadata,
    alpha: float,
    truncated: Literal["ghost", "renormalise"],
    draw: int = 0,
    temperature: float = 1.0,
) -> Batch:
    """Sequences with the targets alpha * delta(label) + (1 - alpha) * sketch.

    `metadata` is that of any part of the rows' manifest. Where the kind leaves tokens out (`topk`, `nucleus`),
    `ghost` keeps the weights and gives (1 - alpha) of the stored tail mass to a ghost token, and `renormalise`
    scales the weights of a label to 1 before mixing. A `threshold` sketch is never scaled: its sum is random, and
    scaling it would bias it. `draw` and `temperature` are as in `entries_of`.
    """
    sequences = [sequence for sequence, _ in rows]
    if alpha == 1:
        return collate_text(sequences)
    targets, tail = concatenate([target.of_draw(draw) for _, target in rows]), None
    if metadata.kind in ("topk", "nucleus"):
        if truncated == "ghost":
            tail = (1 - alpha) * targets.tail_mass
        else:
            targets = replace(targets, tail_mass=np.zeros_like(targets.tail_mass))
    entries = entries_of(targets, tau=metadata.tau, temperature=temperature)
    labels = np.concatenate([sequence.labels for sequence in sequences])
    mixed, in_head = _with_labels(entries, labels=labels, alpha=alpha)
    return _batch(sequences, mixed, in_head=None if tail is None else in_head, tail=tail)


def collate_text(sequences: Sequence[TokenSequence]) -> Batch:
    """Sequences with their own tokens as targets (alpha = 1): the loss is cross-entropy."""
    labels = np.concatenate([sequence.labels for sequence in sequences])
    ones = np.ones(len(labels), dtype=np.float32)
    own = Entries(ids=labels, weights=ones, offsets=np.arange(len(labels) + 1, dtype=np.int64))
    return _batch(sequences, own, in_head=None, tail=None)


def _with_labels(entries: Entries, *, labels: NDArray[np.int32], alpha: float) -> tuple[Entries, NDArray[np.bool_]]:
    """(1 - alpha) of the entries, with alpha of each label's own token before them; and which are not that token."""
    if alpha == 0:
        return entries, np.ones(len(entries.ids), dtype=np.bool_)
    counts = np.diff(entries.offsets) + 1
    offsets = offsets_of(counts.astype(np.int32))
    others = np.ones(offsets[-1], dtype=np.bool_)
    others[offsets[:-1]] = False
    ids = np.empty(offsets[-1], dtype=np.int32)
    weights = np.empty(offsets[-1], dtype=np.float32)
    ids[others], weights[others] = entries.ids, (1 - alpha) * entries.weights
    ids[~others], weights[~others] = labels, alpha
    return Entries(ids=ids, weights=weights, offsets=offsets), others


def _batch(
    sequences: Sequence[TokenSequence],
    entries: Entries,
    *,
    in_head: NDArray[np.bool_] | None,
    tail: NDArray[np.float32] | None,
) -> Batch:
    longest = max(len(sequence.token_ids) for sequence in sequences)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    positions = []
    for index, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        ids[index, :length] = sequence.token_ids
        mask[index, :length] = 1
        positions.append(index * longest + np.arange(sequence.first_label - 1, length - 1))
    labels = np.concatenate([sequence.labels for sequence in sequences])
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        entry_ids=torch.from_numpy(entries.ids.astype(np.int64)),
        entry_weights=torch.from_numpy(entries.weights),
        entry_offsets=torch.from_numpy(entries.offsets),
        entry_in_head=None if in_head is None else torch.from_numpy(in_head),
        tail_mass=None if tail is None else torch.from_numpy(tail.astype(np.float32)),
        position_weights=torch.ones(len(labels)),
        num_tokens=int(mask.sum()),
    )
