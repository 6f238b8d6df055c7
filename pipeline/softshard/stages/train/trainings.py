"""The trainings that a job asks for: one for the adapter, or those of a sweep, and those of the baseline.

The id of a training is a digest of everything that it depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from softshard.config import OptimizerSettings, RetentionSettings, TrainSettings
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.records.digest import canonical_digest
from softshard.stages.train.data import TrainingData
from softshard.stages.train.student import Student

__all__ = ["TrainingSpec", "count_trainings", "training_specs"]

_NAMES = ("kl", "ce", "baseline")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """A training to run."""

    name: str
    alpha: float
    objective: Objective
    optimizer: OptimizerSettings
    retention: RetentionSettings | None
    retention_weight: float
    depends_on: dict[str, Any]
    """Everything that can change the adapter, as plain values."""

    @property
    def training_id(self) -> str:
        """The first 128 bits, in hex, of a SHA-256 of `depends_on`."""
        return canonical_digest(self.depends_on)[:32]

    @property
    def folder(self) -> str:
        """Folder below `adapter/`."""
        return f"{self.name}-{self.training_id[:16]}"

    @property
    def folders(self) -> list[str]:
        """Folders that may hold this training, its own first: a sweep may include the baseline under another name."""
        return [self.folder, *(f"{name}-{self.training_id[:16]}" for name in _NAMES if name != self.name)]

    @property
    def label(self) -> str:
        """A short description, for the progress display."""
        kept = f", lambda {self.retention_weight:g}" if self.retention_weight else ""
        return f"{self.name} {self.optimizer.learning_rate:g}, alpha {self.alpha:g}{kept}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """The settings in which the trainings of a job differ."""

    name: str
    alpha: float
    optimizer: OptimizerSettings
    retention_weight: float


def training_specs(
    settings: TrainSettings,
    data: TrainingData,
    student: Student,
    *,
    retention_digest: str | None,
    seed: int,
) -> tuple[list[TrainingSpec], list[TrainingSpec]]:
    """The trainings from which the adapter is chosen, in the order of the grid; then those of the baseline.

    Args:
        settings: the train section of the job.
        data: what all of them train on.
        student: the model that they adapt.
        retention_digest: of the manifest of the retention text; None without such text.
        seed: of the job.
    """
    shared = _shared_inputs(settings, data, student, seed=seed)

    def make_spec(setting: _Setting) -> TrainingSpec:
        used = settings.retention if setting.retention_weight > 0 else None
        text = retention_digest if used is not None else None
        objective = CROSS_ENTROPY if setting.alpha == 1 else _objective(settings, data)
        depends_on = {
            **shared,
            "alpha": setting.alpha,
            "objective": asdict(objective),
            "optimizer": setting.optimizer.model_dump(exclude={"checkpoint_steps"}),
            "retention_weight": setting.retention_weight,
            "retention": None if used is None else [text, used.objective, used.batch_tokens],
        }
        return TrainingSpec(
            name=setting.name,
            alpha=setting.alpha,
            objective=objective,
            optimizer=setting.optimizer,
            retention=used,
            retention_weight=setting.retention_weight,
            depends_on=depends_on,
        )

    return [make_spec(setting) for setting in _grid(settings)], [make_spec(setting) for setting in _baselines(settings)]


def count_trainings(settings: TrainSettings, *, with_retention: bool = False) -> int:
    """Number of different trainings of a job, those of the grid and of the baseline; or of those with retention."""
    return len(
        {
            (setting.alpha, setting.optimizer.learning_rate, setting.retention_weight)
            for setting in (*_grid(settings), *_baselines(settings))
            if setting.retention_weight > 0 or not with_retention
        }
    )


def _shared_inputs(settings: TrainSettings, data: TrainingData, student: Student, *, seed: int) -> dict[str, Any]:
    """What all trainings of a job depend on. The keys are part of every training's id."""
    return {
        "targets": data.digest_parts(),
        "label_weights": settings.label_weights,
        "packing": settings.packing,
        "weights": student.model.weights,
        "dtype": student.dtype,
        "device": student.device_kind,
        "num_threads": settings.num_threads,
        "adapter": settings.adapter,
        "lora": settings.lora,
        "truncated": settings.truncated if data.leaves_ghost else None,
        "temperature": settings.temperature,
        "shuffle_buffer": settings.shuffle_buffer,
        "chunk_positions": settings.chunk_positions,
        "seed": seed,
    }


def _grid(settings: TrainSettings) -> Iterator[_Setting]:
    sweep, retention = settings.sweep, settings.retention
    weights = (sweep.retention_weight if sweep else ()) or (retention.weight if retention is not None else 0.0,)
    rates = (sweep.learning_rate if sweep else ()) or (settings.optimizer.learning_rate,)
    for alpha, weight, rate in itertools.product(settings.alphas, weights, rates):
        optimizer = settings.optimizer.model_copy(update={"learning_rate": rate})
        yield _Setting(name=settings.objective, alpha=alpha, optimizer=optimizer, retention_weight=weight)


def _baselines(settings: TrainSettings) -> Iterator[_Setting]:
    baseline = settings.baseline
    for rate in () if baseline is None else baseline.learning_rates:
        optimizer = settings.optimizer.model_copy(update={"learning_rate": rate})
        weight = 0.0 if baseline is None else baseline.retention_weight
        yield _Setting(name="baseline", alpha=1.0, optimizer=optimizer, retention_weight=weight)


def _objective(settings: TrainSettings, data: TrainingData) -> Objective:
    temperature = settings.temperature * data.temperature if settings.match_temperature else 1.0
    return Objective(divergence=settings.divergence, jsd_beta=settings.jsd_beta, temperature=temperature)
