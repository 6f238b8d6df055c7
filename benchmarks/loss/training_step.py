"""A training step of a real model with LoRA, from stored targets or with chunked cross-entropy, otherwise the same.

In: the text and model of `benchmarks.harness`. Out: a trainer whose steps collate, run forward and backward, clip and
update. The model has the dtype that a job uses by default; sequences, adapter and optimiser are those of a job too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Positions, positions
from benchmarks.loss.loss_functions import CHUNK, chunked_cross_entropy
from softshard.config import LoraSettings, ThresholdSketch
from softshard.data.batch import collate, collate_text
from softshard.data.mixing import Mixing
from softshard.finetune.adapters.lora import attach_lora
from softshard.finetune.hidden_states import hidden_states
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.models import load_model, resolve_dtype
from softshard.models.decoder import Decoder
from softshard.shard.read import Row
from softshard.shard.schema import Fidelity, PartMetadata
from softshard.sketch.join import concatenate, split_rows
from softshard.sketch.reduce import sketch_rows

__all__ = ["STEPS", "Trainer"]

_MODEL = "SmolLM2-135M-Instruct"
_TAU = 1 / 24
_ROWS_OF_LOGITS = 256


class Trainer:
    """Takes steps on one batch; `dtype` of the frozen weights is `auto` but where another is given."""

    def __init__(self, cache: Path, *, num_positions: int, dtype: torch.dtype | None = None) -> None:
        source = positions("small", num_positions=num_positions, cache=cache)
        self._metadata, self._rows = _metadata(source.vocab_size), _rows(source)
        kind = dtype or resolve_dtype("auto", device="cpu")
        model = load_model(cache / _MODEL, dtype=kind, device="cpu").eval()
        self._decoder = Decoder.of(model)
        self._adapter = [p for p in attach_lora(model, LoraSettings(), seed=0).parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._adapter, lr=1e-4)

    def step(self, loss: Callable[[Trainer], Tensor]) -> float:
        """Its loss; the adapter moves."""
        self._optimizer.zero_grad()
        mean = loss(self)
        torch.autograd.backward(mean)
        nn.utils.clip_grad_norm_(self._adapter, 1.0)
        self._optimizer.step()
        return mean.item()

    def from_targets(self, *, alpha: float = 0.5) -> Tensor:
        batch = collate(self._rows, metadata=self._metadata, mixing=Mixing(alpha=alpha, truncated="ghost"))
        return CROSS_ENTROPY.loss(self._decoder, batch, num_valid=self._metadata.vocab_size, chunk_positions=CHUNK)

    def cross_entropy(self) -> Tensor:
        batch = collate_text([sequence for sequence, _ in self._rows])
        hidden = hidden_states(self._decoder, batch)
        return chunked_cross_entropy(hidden, self._decoder.weight, batch.labels) / len(batch.labels)


STEPS: Mapping[str, Callable[[Trainer], Tensor]] = {
    "from_targets": Trainer.from_targets,
    "cross_entropy": Trainer.cross_entropy,
}


def _rows(source: Positions) -> list[Row]:
    """Sequences with the targets of a threshold sketch."""
    pieces = []
    uniforms = source.uniforms(seed=0, num_draws=1)
    for start in range(0, len(source.states), _ROWS_OF_LOGITS):
        rows = slice(start, min(start + _ROWS_OF_LOGITS, len(source.states)))
        targets, _ = sketch_rows(
            source.logits(rows.start, rows.stop),
            labels=source.labels[rows],
            uniforms=np.ascontiguousarray(uniforms[:, rows]),
            settings=ThresholdSketch(tau=_TAU),
            vocab_size=source.vocab_size,
            places=source.places[rows],
        )
        pieces.append(targets)
    each = split_rows(concatenate(pieces), [sequence.num_labels for sequence in source.sequences])
    return list(zip(source.sequences, each, strict=True))


def _metadata(vocab_size: int) -> PartMetadata:
    """Of a part that would hold the rows; the loss goes by its kind and tau."""
    fidelity = Fidelity(
        mean_squared_error=0,
        gradient_angle_degrees=0,
        mean_kl_nats=None,
        mean_entries=0,
        mass_by_rank=None,
        num_ranked=0,
    )
    return PartMetadata(
        schema_version=1,
        part_id="0" * 32,
        kind="threshold",
        tau=_TAU,
        draws=1,
        k=None,
        nucleus_mass=None,
        step=ThresholdSketch().step,
        temperature=1.0,
        seed=0,
        tokenizer_fingerprint="",
        vocab_size=vocab_size,
        teacher={},
        fidelity=fidelity,
    )
