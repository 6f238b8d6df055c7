"""The transformers engine: one model on one device, with no adapter, one, or several that are averaged.

Sequences are batched by length under a token budget. The body runs once per batch and adapter. The output matrix, whose
product with the hidden states is the large tensor, is applied to the positions before labels alone, 256 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softshard.config import DataType, SketchSettings, TeacherSettings
from softshard.models import check_vocabulary, load_model, release_memory, resolve_device, resolve_dtype
from softshard.models.decoder import Decoder, batches_by_length
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.join import concatenate, split_rows
from softshard.sketch.philox import tail_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.teacher.protocol import Teacher, TeacherIdentity

__all__ = ["AVERAGES_ADAPTERS", "TransformersTeacher", "engine_identity", "open_engine", "process_identity"]

AVERAGES_ADAPTERS = True
_ROWS_OF_LOGITS = 256


def engine_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """See `Engine.engine_identity`; the context does not matter, since sequences are batched by their own lengths."""
    return {
        **process_identity(settings.device, settings.dtype),
        "num_threads": settings.num_threads,
        "batch_tokens": settings.batch_tokens,
        "weights": weights,
        "adapters": list(adapters),
    }


def process_identity(device: str, dtype: DataType) -> dict[str, str]:
    """See `Engine.process_identity`."""
    import transformers

    device = resolve_device(device)
    return {
        "engine": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": device.split(":")[0],
        "dtype": str(resolve_dtype(dtype, device=device)).removeprefix("torch."),
    }


def open_engine(
    folder: Path, *, adapters: Sequence[Path], identity: TeacherIdentity, device: str, vocab_size: int
) -> Teacher:
    """See `Engine.open_engine`."""
    return TransformersTeacher(folder, adapters=adapters, identity=identity, device=device, vocab_size=vocab_size)


class TransformersTeacher:
    """A `Teacher` that runs a model of transformers."""

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

    def close(self) -> None:
        """Drop the model and free its memory on the device, which torch would otherwise keep for this process."""
        del self._model, self._decoder
        release_memory(self._device)

    def score(
        self, sequences: Sequence[TokenSequence], *, sketch: SketchSettings, seed: int
    ) -> tuple[list[SequenceTargets], FidelitySums]:
        """Targets of each sequence; see `Teacher.score`."""
        return self.score_each(sequences, sketches=(sketch,), seed=seed)[0]

    def score_each(
        self, sequences: Sequence[TokenSequence], *, sketches: Sequence[SketchSettings], seed: int
    ) -> list[tuple[list[SequenceTargets], FidelitySums]]:
        """Targets of each sequence with each of some settings; see `Teacher.score_each`."""
        results: list[dict[int, SequenceTargets]] = [{} for _ in sketches]
        sums = [FidelitySums() for _ in sketches]
        for batch in batches_by_length(sequences, batch_tokens=self._batch_tokens):
            scored = self._score_batch([sequences[index] for index in batch], sketches, seed)
            for number, (targets, measured) in enumerate(scored):
                results[number].update(zip(batch, targets, strict=True))
                sums[number] += measured
        in_order = [[result[index] for index in range(len(sequences))] for result in results]
        return list(zip(in_order, sums, strict=True))

    @torch.inference_mode()
    def _score_batch(
        self, batch: list[TokenSequence], sketches: Sequence[SketchSettings], seed: int
    ) -> list[tuple[list[SequenceTargets], FidelitySums]]:
        states = [self._states(batch, name) for name in self._names]
        labels = torch.from_numpy(np.concatenate([sequence.labels for sequence in batch]).astype(np.int64)).to(
            self._device
        )
        draws = [sketch.num_draws for sketch in sketches]
        uniforms = tail_uniforms(batch, seed=seed, draws=max(draws))
        places = [(s.sequence_id, position) for s in batch for position in s.positions.tolist()]
        pieces: list[list[SequenceTargets]] = [[] for _ in sketches]
        sums = [FidelitySums() for _ in sketches]
        for start in range(0, len(labels), _ROWS_OF_LOGITS):
            rows = slice(start, start + _ROWS_OF_LOGITS)
            for number, logits, temperature in self._logits_of_each([state[rows] for state in states], sketches):
                targets, measured = sketch_rows(
                    logits,
                    labels=labels[rows],
                    uniforms=uniforms[: draws[number], rows],
                    settings=sketches[number],
                    vocab_size=self._vocab_size,
                    places=places[rows],
                    temperature=temperature,
                )
                pieces[number].append(targets)
                sums[number] += measured
        lengths = [sequence.num_labels for sequence in batch]
        return [(split_rows(concatenate(piece), lengths), total) for piece, total in zip(pieces, sums, strict=True)]

    def _states(self, batch: list[TokenSequence], adapter: str | None) -> Tensor:
        if adapter is not None:
            self._model.set_adapter(adapter)
        return self._decoder.hidden_states(batch)

    def _logits_of_each(
        self, states: list[Tensor], sketches: Sequence[SketchSettings]
    ) -> Iterator[tuple[int, Tensor, float]]:
        """The index of each of the settings with its `_logits`, which are computed once per temperature."""
        for temperature in dict.fromkeys(sketch.temperature for sketch in sketches):
            logits, divisor = self._logits(states, temperature)
            for number, sketch in enumerate(sketches):
                if sketch.temperature == temperature:
                    yield number, logits, divisor

    def _logits(self, states: list[Tensor], temperature: float) -> tuple[Tensor, float]:
        """Logits and the temperature that they must still be divided by.

        For several adapters, the logarithm of the mean of their distributions at the temperature, and 1.
        """
        if len(states) == 1:
            return self._decoder.logits(states[0]), temperature
        mean: Tensor | None = None
        for state in states:
            logits = self._decoder.logits(state)[:, : self._vocab_size].float()
            log_probabilities = torch.log_softmax(logits / temperature, 1)
            mean = log_probabilities if mean is None else torch.logaddexp(mean, log_probabilities, out=mean)
        assert mean is not None
        return mean.sub_(float(np.log(len(states)))), 1.0


def _with_adapters(model: Any, adapters: Sequence[Path], device: str) -> tuple[Any, list[str | None]]:
    from softshard.finetune.adapters.lora import load_adapter

    names: list[str | None] = [f"fold-{index}" for index in range(len(adapters))]
    for name, folder in zip(names, adapters, strict=True):
        model = load_adapter(model, folder, adapter_name=str(name), device=device)
    return model.eval(), names or [None]
