"""The models that a job names, checked before anything is computed, so that none is refused after hours of work.

A device, an engine and the packages of a quantised model are looked for where they will be used. Devices of workers on
other machines are known only there. The student is compared with the teacher's tokenizer, and gets its adapter once
without weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from softshard.config import Job
from softshard.errors import ManifestMissing
from softshard.models import check_context, check_device, check_packages
from softshard.output.workspace import Workspace
from softshard.stages.train.data import other_sets, refuse_unfit
from softshard.stages.train.student import check_adapter, check_student
from softshard.teacher.engines import check_engine

__all__ = ["check_models"]


def check_models(workspace: Workspace, stages: Collection[str]) -> list[str]:
    """Refuse models, devices and engines that one of these stages could not use; returns warnings of the others.

    Raises:
        DeviceMissing: torch does not see the device.
        EngineMissing: the engine is not installed.
        PackageMissing: a model is quantised, and its package is not installed.
        ModelInvalid: a model is of another kind, too short for the context, or cannot have the job's adapter.
        TokenizerMismatch, VocabularyMismatch: the student does not read the tokens of the targets.
        BlendInvalid, TargetsUnsuitable: targets of another job that are there already do not fit.
    """
    job = workspace.job
    trains = not {"train", "evaluate"}.isdisjoint(stages)
    uses_teacher = not {"teacher", "targets"}.isdisjoint(stages)
    needs_transformers = job.teacher.engine == "transformers" or job.teacher.folds > 0
    if uses_teacher:
        _check_engine(job, stages)
        if needs_transformers:
            check_packages(workspace.teacher_model.folder, setting="teacher.model")
    if trains:
        check_device(job.train.device, setting="train.device")
        check_packages(workspace.student_model.folder, setting="train.model")
    check_context(workspace.teacher_model.folder, context_tokens=job.corpus.context_tokens)
    warnings: list[str] = []
    if uses_teacher and needs_transformers:
        warnings += check_adapter(workspace.teacher_model, "lora", job.teacher.lora)
    if trains:
        warnings += _check_student(workspace)
    return list(dict.fromkeys(warnings))


def _check_engine(job: Job, stages: Collection[str]) -> None:
    if job.cluster.is_local:
        check_device(job.teacher.device, setting="teacher.device")
    if "targets" in stages:
        check_engine(job.teacher)


def _check_student(workspace: Workspace) -> list[str]:
    settings, teacher = workspace.job.train, workspace.teacher_model
    vocab_size = teacher.tokenizer.vocab_size
    check_student(workspace, data=teacher.name, fingerprint=teacher.tokenizer.fingerprint, vocab_size=vocab_size)
    warnings = check_adapter(workspace.student_model, settings.adapter, settings.lora)
    with contextlib.suppress(ManifestMissing):
        refuse_unfit(workspace, other_sets(settings), vocab_size=vocab_size)
    return warnings
