"""The transformers engine: one model on one device, with no adapter, one, or several that are averaged.

Sequences are batched by length under a token budget. The body runs once a batch and adapter; the output matrix, which
makes the large tensor, is applied to a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from softshard.config import DataType, SketchSettings, TeacherSettings
from softshard.decoder import Decoder, batches_by_length
from softshard.errors import EngineDiffers
from softshard.models import check_vocabulary, load_model, resolve_device, resolve_dtype
from softshard.target.fidelity import FidelitySums
from softshard.target.philox import label_uniforms
from softshard.target.sketch import concatenate, sketch_rows, split_rows
from softshard.target.types import SequenceTargets, TokenSequence
from softshard.teacher.protocol import TeacherIdentity

__all__ = ["TransformersTeacher", "engine_identity", "refuse_other_engine"]

_ROWS_OF_LOGITS = 256


def engine_identity(settings: TeacherSettings, *, weights: str, adapters: Sequence[str]) -> TeacherIdentity:
    """Identity of this engine, known before it is loaded. `weights` and `adapters` are digests."""
    return {
        **_process_identity(settings.device, settings.dtype),
        "num_threads": settings.num_threads,
        "batch_tokens": settings.batch_tokens,
        "weights": weights,
        "adapters": list(adapters),
    }


def _process_identity(device: str, dtype: DataType) -> dict[str, str]:
    """What of an identity depends on the process that asks."""
    import transformers

    device = resolve_device(device)
    return {
        "engine": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": device.split(":")[0],
        "dtype": str(resolve_dtype(dtype, device=device)).removeprefix("torch."),
    }


def refuse_other_engine(expected: TeacherIdentity, *, device: str) -> None:
    """Refuse to score with another engine than the one that the part is named by.

    Raises:
        EngineDiffers: this process has another version or kind of device.
    """
    for what, here in _process_identity(device, cast("DataType", expected["dtype"])).items():
        if here != expected[what]:
            raise EngineDiffers(what=what, expected=str(expected[what]), actual=here)


class TransformersTeacher:
    """A `Teacher` that runs a transformers model."""

    def __init__(
        self,
        folder: Path,
        *,
        adapters: Sequence[Path],
        identity: TeacherIdentity,
        device: str,
        vocab_size: int,
    ) -> None:
        self._device = resolve_device(device)
        self.identity = identity
        self._batch_tokens = int(str(identity["batch_tokens"]))
        self._vocab_size = vocab_size
        if self._device == "cpu":
            torch.set_num_threads(int(str(identity["num_threads"])))
        model = load_model(folder, dtype=getattr(torch, str(identity["dtype"])), device=self._device)
        self._model, self._names = _with_adapters(model, adapters, self._device)
        self._decoder = Decoder.of(self._model)
        size = self._decoder.output_size
        check_vocabulary(model=str(folder), model_size=size, data="the tokenizer", data_size=vocab_size)

    def score(
        self, sequences: Sequence[TokenSequence], *, sketch: SketchSettings, seed: int
    ) -> tuple[list[SequenceTargets], FidelitySums]:
        """Targets of each sequence; see `Teacher.score`."""
        results: dict[int, SequenceTargets] = {}
        fidelity = FidelitySums()
        for batch in batches_by_length(sequences, batch_tokens=self._batch_tokens):
            scored, measured = self._score_batch([sequences[index] for index in batch], sketch, seed)
            results.update(zip(batch, scored, strict=True))
            fidelity += measured
        return [results[index] for index in range(len(sequences))], fidelity

    @torch.inference_mode()
    def _score_batch(
        self, batch: list[TokenSequence], sketch: SketchSettings, seed: int
    ) -> tuple[list[SequenceTargets], FidelitySums]:
        states = [self._states(batch, name) for name in self._names]
        labels = torch.from_numpy(np.concatenate([sequence.labels for sequence in batch]).astype(np.int64)).to(
            self._device
        )
        uniforms = np.concatenate(
            [
                label_uniforms(seed=seed, sequence_id=s.sequence_id, first_label=s.first_label, num_labels=s.num_labels)
                for s in batch
            ]
        )
        places = [(s.sequence_id, s.first_label + j - 1) for s in batch for j in range(s.num_labels)]
        pieces, fidelity = [], FidelitySums()
        for start in range(0, len(labels), _ROWS_OF_LOGITS):
            rows = slice(start, start + _ROWS_OF_LOGITS)
            targets, measured = sketch_rows(
                self._logits([state[rows] for state in states], sketch.temperature),
                labels=labels[rows],
                uniforms=uniforms[rows],
                settings=sketch,
                vocab_size=self._vocab_size,
                places=places[rows],
            )
            pieces.append(targets)
            fidelity += measured
        return split_rows(concatenate(pieces), [sequence.num_labels for sequence in batch]), fidelity

    def _states(self, batch: list[TokenSequence], adapter: str | None) -> Tensor:
        if adapter is not None:
            self._model.set_adapter(adapter)
        return self._decoder.states(batch)

    def _logits(self, states: list[Tensor], temperature: float) -> Tensor:
        logits = [self._decoder.logits(state)[:, : self._vocab_size].float() / temperature for state in states]
        if len(logits) == 1:
            return logits[0]
        stacked = torch.stack([torch.log_softmax(one, 1) for one in logits])
        return torch.logsumexp(stacked, 0) - float(np.log(len(logits)))


def _with_adapters(model: Any, adapters: Sequence[Path], device: str) -> tuple[Any, list[str | None]]:
    from softshard.train.lora import load_adapter

    names: list[str | None] = [f"fold-{index}" for index in range(len(adapters))]
    for name, folder in zip(names, adapters, strict=True):
        model = load_adapter(model, folder, adapter_name=str(name), device=device)
    return model.eval(), names or [None]
