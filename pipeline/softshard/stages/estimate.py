"""What the student's trainings and the report will take, and whether a corpus is large enough for them to mean much.

Nothing here is measured: steps follow from tokens, and times from the speed at which the teacher scores, where that is
the same model on the same kind of device. Otherwise there is a reason in place of a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from softshard.config import Job, OptimizerSettings
from softshard.models import num_weights, resolve_device, resolve_dtype
from softshard.output.workspace import Workspace
from softshard.stages.train.trainings import count_trainings

__all__ = [
    "PASSES_OF_A_TRAINING_STEP",
    "StudentEstimate",
    "WeightBytes",
    "estimate_student",
    "weigh_corpus",
    "weight_bytes",
]

PASSES_OF_A_TRAINING_STEP = 3.0
"""A trained token costs as much as this many scored tokens: a forward pass, and a backward pass of twice its work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentEstimate:
    """Of all trainings of the student, and of the report."""

    steps: int
    """Of one training."""
    training_hours: float | None
    """Of all trainings, one after the other, at the teacher's speed; None where that says nothing about the student."""
    evaluation_hours: float | None
    """Scoring the hold-out after each training and for the report, without the report's samples; None likewise."""
    not_measured: str | None
    """Why there are no hours."""


def num_steps(num_tokens: float, optimizer: OptimizerSettings) -> int:
    """Steps of a training on some tokens, if its batches were full."""
    return max(1, round(optimizer.epochs * math.ceil(num_tokens / optimizer.batch_tokens)))


def estimate_student(job: Job, *, train_tokens: int, test_tokens: int, tokens_per_second: float) -> StudentEstimate:
    """The estimate for a corpus with so many tokens in its windows, at a worker's measured or given speed."""
    settings = job.train
    steps, trainings = num_steps(train_tokens, settings.optimizer), count_trainings(settings)
    reason = _why_unknown(job)
    training = evaluation = None
    if reason is None:
        passes = trainings * train_tokens * settings.optimizer.epochs * PASSES_OF_A_TRAINING_STEP
        if settings.retention is not None:
            of_the_base = 1.0 if settings.retention.objective == "kl" else 0.0
            retained = count_trainings(settings, with_retention=True) * steps * settings.retention.batch_tokens
            passes += retained * (PASSES_OF_A_TRAINING_STEP + of_the_base)
        models = 2 if settings.baseline is None else 3
        training = passes / tokens_per_second / 3600
        evaluation = test_tokens * (trainings + models) / tokens_per_second / 3600
    return StudentEstimate(steps=steps, training_hours=training, evaluation_hours=evaluation, not_measured=reason)


def _why_unknown(job: Job) -> str | None:
    if job.train.model not in {None, job.teacher.model}:
        return "the student is another model"
    if job.teacher.engine != "transformers":
        return f"the speed is that of {job.teacher.engine}"
    kinds = [resolve_device(device).split(":")[0] for device in (job.teacher.device, job.train.device)]
    return None if kinds[0] == kinds[1] else f"the speed is that of {kinds[0]}, the student is trained on {kinds[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Memory of the weights alone; activations, gradients and logits need more."""

    teacher: int
    """Of each worker."""
    student: int


def weight_bytes(workspace: Workspace) -> WeightBytes:
    """Bytes of the models' weights in the types that the job computes with. Raises ModelInvalid."""
    teacher, train = workspace.job.teacher, workspace.job.train
    of_teacher = resolve_dtype(teacher.dtype, device=resolve_device(teacher.device)).itemsize
    of_student = resolve_dtype(train.dtype, device=resolve_device(train.device)).itemsize
    return WeightBytes(
        teacher=num_weights(workspace.teacher_model.folder) * of_teacher,
        student=num_weights(workspace.student_model.folder) * of_student,
    )


def weigh_corpus(job: Job, *, train_tokens: int, test_documents: int) -> list[str]:
    """Warnings about a corpus that can be trained on, and is too small to mean much."""
    warnings = []
    if test_documents == 1:
        warnings.append(
            "the hold-out is one document, so what is measured on it says little about other texts; add documents, or"
            " raise `corpus.holdout_fraction`"
        )
    folds = job.teacher.folds
    trained = [("train.optimizer", train_tokens, job.train.optimizer)]
    if folds:
        trained.append(("teacher.optimizer", train_tokens * (folds - 1) // folds, job.teacher.optimizer))
    warnings += [
        f"a training with `{section}` is one step on about {num_tokens:,} tokens; add documents, lower its"
        f" `batch_tokens` ({optimizer.batch_tokens:,}), or raise its `epochs`"
        for section, num_tokens, optimizer in trained
        if num_steps(num_tokens, optimizer) == 1
    ]
    return warnings
