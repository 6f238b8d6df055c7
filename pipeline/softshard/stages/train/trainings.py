"""The trainings of a job before they are run: the adapter's, or those of a sweep, and the baseline's.

Each is named by a digest of everything that it depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from softshard.config import OptimizerSettings, RetentionSettings, TrainSettings
from softshard.corpus.manifest import CorpusManifest
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.output.workspace import Workspace
from softshard.records.digest import canonical_digest
from softshard.stages.train.data import TrainingData
from softshard.teacher.style import training_precision

__all__ = ["TrainingSpec", "count_trainings", "training_specs"]

_NAMES = ("kl", "ce", "baseline")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """One training before it is run."""

    name: str
    alpha: float
    objective: Objective
    optimizer: OptimizerSettings
    retention: RetentionSettings | None
    retention_weight: float
    depends_on: dict[str, Any]

    @property
    def training_id(self) -> str:
        """128 bits, in hex, of a SHA-256 over everything that can change the adapter."""
        return canonical_digest(self.depends_on)[:32]

    @property
    def folder(self) -> str:
        """Folder below `adapter/`."""
        return f"{self.name}-{self.training_id[:16]}"

    @property
    def folders(self) -> list[str]:
        """Where the same training may lie under another name, after its own folder: a sweep may hold the baseline."""
        return [self.folder, *(f"{name}-{self.training_id[:16]}" for name in _NAMES if name != self.name)]

    @property
    def label(self) -> str:
        """A few words for the progress."""
        kept = f", lambda {self.retention_weight:g}" if self.retention_weight else ""
        return f"{self.name} {self.optimizer.learning_rate:g}, alpha {self.alpha:g}{kept}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What differs between the trainings of a job."""

    name: str
    alpha: float
    optimizer: OptimizerSettings
    retention_weight: float


def training_specs(
    workspace: Workspace, feed: TrainingData, retention: CorpusManifest | None
) -> tuple[list[TrainingSpec], list[TrainingSpec]]:
    """The trainings of which one is the adapter, in the order of the grid; then those of the baseline."""
    settings, shared = workspace.job.train, _shared(workspace, feed)

    def plan(own: _Setting) -> TrainingSpec:
        used = settings.retention if own.retention_weight > 0 else None
        text = retention.digest if retention is not None and used is not None else None
        objective = CROSS_ENTROPY if own.alpha == 1 else _objective(settings, feed)
        depends_on = {
            **shared,
            "alpha": own.alpha,
            "objective": asdict(objective),
            "optimizer": own.optimizer.model_dump(exclude={"checkpoint_steps"}),
            "retention_weight": own.retention_weight,
            "retention": None if used is None else [text, used.objective, used.batch_tokens],
        }
        return TrainingSpec(
            name=own.name,
            alpha=own.alpha,
            objective=objective,
            optimizer=own.optimizer,
            retention=used,
            retention_weight=own.retention_weight,
            depends_on=depends_on,
        )

    return [plan(one) for one in _grid(settings)], [plan(one) for one in _baselines(settings)]


def count_trainings(settings: TrainSettings) -> int:
    """Trainings of a job: those of the grid and of the baseline, each once."""
    return len(
        {
            (one.alpha, one.optimizer.learning_rate, one.retention_weight)
            for one in (*_grid(settings), *_baselines(settings))
        }
    )


def _shared(workspace: Workspace, feed: TrainingData) -> dict[str, Any]:
    settings, student = workspace.job.train, workspace.student_model
    dtype, device = training_precision(settings.dtype, device=settings.device)
    return {
        "targets": feed.digest_parts(),
        "label_weights": settings.label_weights,
        "packing": settings.packing,
        "weights": student.weights,
        "dtype": dtype,
        "device": device,
        "num_threads": settings.num_threads,
        "adapter": settings.adapter,
        "lora": settings.lora,
        "truncated": settings.truncated if feed.leaves_ghost else None,
        "temperature": settings.temperature,
        "shuffle_buffer": settings.shuffle_buffer,
        "chunk_positions": settings.chunk_positions,
        "seed": workspace.job.seed,
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


def _objective(settings: TrainSettings, feed: TrainingData) -> Objective:
    temperature = settings.temperature * feed.temperature if settings.match_temperature else 1.0
    return Objective(divergence=settings.divergence, jsd_beta=settings.jsd_beta, temperature=temperature)
