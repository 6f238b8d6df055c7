"""Rows of parts, or plain sequences, to the tensors of a training step.

In: sequences with their stored targets, or sequences alone. Out: a `Batch`, padded or packed, in which each label's own
token is mixed into the stored target. When packed, the sequences form one row, `position_ids` restart with each of
them, and `cu_seq_lens` has the boundaries: no attention and no target crosses from one sequence to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.data.mixing import MixedRow, Mixing, mixed_rows, text_row
from softshard.data.sparse_targets import SparseTargets
from softshard.shard.decode import Block
from softshard.shard.read import Row
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.entries import ranges_from
from softshard.sketch.join import concatenate
from softshard.sketch.types import TokenSequence

__all__ = ["Batch", "collate", "collate_mixed", "collate_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """S sequences, padded to B = S rows of L tokens or packed in B = 1, and the targets of their N labels, in order."""

    input_ids: Tensor
    """[B, L] int64, padded on the right with 0."""
    attention_mask: Tensor | None
    """[B, L] int64, 0 on padding; None when packed."""
    position_ids: Tensor | None
    """[1, L] int64 index of each token in its own sequence, when packed; else None."""
    cu_seq_lens: Tensor | None
    """[S + 1] int32 index at which each sequence begins, and the end of the last one, when packed; else None."""
    max_length: int
    """Tokens of the longest sequence."""
    positions: Tensor
    """[N] int64, b * L + t of the position before each label, whose logits are compared with the target."""
    labels: Tensor
    """[N] int64 ids of the labels."""
    targets: SparseTargets
    """Targets of the N labels."""
    num_tokens: int
    """Tokens without padding; 0 in a batch of weight zero."""
    cursor: tuple[int, int] | None = None
    """Epoch, and number of its batches that all ranks together have received up to this round; None where the batch
    does not come from a data set."""

    @property
    def entry_ids(self) -> Tensor:
        """[E] int64, as in `targets`."""
        return self.targets.entry_ids

    @property
    def entry_weights(self) -> Tensor:
        """[E] float32, as in `targets`."""
        return self.targets.entry_weights

    @property
    def entry_offsets(self) -> Tensor:
        """[N + 1] int64, as in `targets`."""
        return self.targets.entry_offsets

    @property
    def position_weights(self) -> Tensor:
        """[N] float32, as in `targets`."""
        return self.targets.position_weights

    def model_inputs(self) -> dict[str, Any]:
        """Arguments for a model of transformers, including those of its flash attention.

        With any other attention, transformers builds a block-diagonal mask from `position_ids`, which it does only
        without a cache and without an attention mask.
        """
        if self.cu_seq_lens is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
        }

    def features(self) -> dict[str, Any]:
        """The batch as a flat mapping, which Trainer and accelerate can move to a device: the arguments of a model that
        has taken `accept_targets`.

        No key is `labels`: other models would compute cross-entropy to the text from it.
        """
        inputs = {name: item for name, item in self.model_inputs().items() if name != "use_cache"}
        return {**inputs, "positions": self.positions, **self.targets.tensors()}

    def to(self, device: str | torch.device) -> Batch:
        """The batch on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; a DataLoader with `pin_memory=True` calls it."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def without_weight(self) -> Batch:
        """The same batch with weights of zero, for a rank without a batch of its own in the last round of an epoch."""
        return replace(self, targets=self.targets.without_weight(), num_tokens=0)

    def _with_tensors(self, change: Callable[[Tensor | SparseTargets], Tensor | SparseTargets]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(item) for name, item in values.items() if isinstance(item, Tensor | SparseTargets)}
        return replace(self, **changed)  # type: ignore[arg-type]  # each value keeps its type


def collate(
    rows: Sequence[Row], *, metadata: PartMetadata, mixing: Mixing, draw: int = 0, packing: bool = False
) -> Batch:
    """Stored sequences with their targets, mixed with their labels.

    Args:
        rows: sequences and their stored targets.
        metadata: of any part of the rows' manifest.
        mixing: how targets are mixed with labels.
        draw: which of the independent tails, as in `entries_of`.
        packing: one row of tokens, without padding.
    """
    sequences = [sequence for sequence, _ in rows]
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    starts = counts_to_offsets(lengths)[:-1].tolist()
    block = Block(
        token_ids=np.concatenate([sequence.token_ids for sequence in sequences]),
        lengths=lengths,
        label_indices=np.concatenate([at + own.label_indices for at, own in zip(starts, sequences, strict=True)]),
        label_counts=np.array([sequence.num_labels for sequence in sequences]),
        targets=concatenate([targets.of_draw(draw) for _, targets in rows]),
    )
    mixed = mixed_rows(block, range(len(rows)), metadata=metadata, mixing=mixing)
    return collate_mixed([row for _, row in mixed], packing=packing, own_token=mixing.alpha > 0)


def collate_text(sequences: Sequence[TokenSequence], *, packing: bool = False) -> Batch:
    """Sequences with their own tokens as targets (alpha = 1): the loss is cross-entropy."""
    return collate_mixed([text_row(sequence) for sequence in sequences], packing=packing)


def collate_mixed(rows: Sequence[MixedRow], *, packing: bool = False, own_token: bool | Sequence[bool] = True) -> Batch:
    """The batch of some rows.

    Args:
        rows: with their targets.
        packing: one row of tokens, without padding.
        own_token: whether the first entry of each label is its own token; for all rows, or for each.

    Raises:
        ValueError: some rows have a ghost token and others none; a batch has it for all labels or for none.
    """
    lengths = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    num_labels = np.array([len(row.positions) for row in rows], dtype=np.int64)
    longest, total = int(lengths.max()), int(lengths.sum())
    starts = counts_to_offsets(lengths)[:-1] if packing else np.arange(len(rows)) * longest
    ids = np.zeros(total if packing else len(rows) * longest, dtype=np.int64)
    for start, row in zip(starts.tolist(), rows, strict=True):
        ids[start : start + len(row.token_ids)] = row.token_ids
    positions = np.repeat(starts, num_labels) + np.concatenate([row.positions for row in rows])
    return Batch(
        input_ids=torch.from_numpy(ids).view(1 if packing else len(rows), -1),
        attention_mask=None if packing else torch.from_numpy(np.arange(longest) < lengths[:, None]).long(),
        position_ids=torch.from_numpy(ranges_from(np.zeros_like(lengths), lengths))[None] if packing else None,
        cu_seq_lens=torch.from_numpy(counts_to_offsets(lengths)).int() if packing else None,
        max_length=longest,
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(ids[positions + 1]),
        targets=_targets(rows, own_token=np.repeat(np.broadcast_to(own_token, len(rows)), num_labels)),
        num_tokens=total,
    )


def _targets(rows: Sequence[MixedRow], *, own_token: NDArray[np.bool_]) -> SparseTargets:
    """Targets of all labels of some rows; `own_token` [N]: the first entry of the label is its own token."""
    offsets = counts_to_offsets(np.concatenate([row.counts for row in rows]))
    tail = _of_labels(rows, [row.tail_mass for row in rows])
    weights = _of_labels(rows, [row.position_weights for row in rows], missing=1.0)
    counted = None
    if any(row.counted is not None for row in rows):
        each = [row.position_weights if row.counted is None else row.counted for row in rows]
        counted = _of_labels(rows, each, missing=1.0)
    return SparseTargets(
        entry_ids=torch.from_numpy(np.concatenate([row.entry_ids for row in rows], dtype=np.int64)),
        entry_weights=torch.from_numpy(np.concatenate([row.entry_weights for row in rows])),
        entry_offsets=torch.from_numpy(offsets),
        entry_in_head=None if tail is None else _in_head(offsets, own_token),
        tail_mass=tail,
        position_weights=torch.ones(len(offsets) - 1) if weights is None else weights,
        counted=counted,
    )


def _in_head(offsets: NDArray[np.int64], own_token: NDArray[np.bool_]) -> Tensor:
    """[E] False for the first entry of each label in `own_token`, which is the label itself."""
    in_head = torch.ones(int(offsets[-1]), dtype=torch.bool)
    in_head[offsets[:-1][own_token]] = False
    return in_head


def _of_labels(
    rows: Sequence[MixedRow], values: Sequence[NDArray[np.float32] | None], *, missing: float | None = None
) -> Tensor | None:
    """[N] values of all labels, `missing` for rows without values; None if no row has values."""
    if all(value is None for value in values):
        return None
    if missing is None and any(value is None for value in values):
        raise ValueError(
            'some rows of a batch have a ghost token (topk or nucleus, `truncated="ghost"`, alpha below 1) and others'
            ' none; put them in separate batches, or make rows of topk and nucleus with `truncated="renormalise"`'
        )
    whole = [
        np.full(len(row.counts), missing, dtype=np.float32) if value is None else value
        for row, value in zip(rows, values, strict=True)
    ]
    return torch.from_numpy(np.concatenate(whole))
