"""The student: the model that trainings adapt and that the report measures, with its data type and device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softshard.config import AdapterKind, LoraSettings
from softshard.finetune.adapters.kinds import attach_adapter, load_adapter
from softshard.models import (
    check_context,
    check_tokenizer,
    check_vocabulary,
    expert_share,
    load_empty_model,
    load_model,
    output_size,
    resolve_device,
)
from softshard.models.output_layer import output_parts
from softshard.output.workspace import Model, Workspace
from softshard.teacher.style import training_precision

__all__ = ["Student", "check_adapter", "check_student", "make_student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A model, and how it is loaded."""

    model: Model
    dtype: str
    """Name of the torch type."""
    device: str
    """Device with its index where there are several, such as `cuda:1`."""
    device_kind: str
    """The same without the index."""
    num_threads: int | None
    """CPU threads of torch; None: all cores."""

    def load(self, adapter: Path | None = None) -> Any:
        """Load the model, with the adapter in a folder where one is given; also sets torch's number of threads."""
        import torch

        torch.set_num_threads(self.num_threads or len(os.sched_getaffinity(0)))
        model = load_model(self.model.folder, dtype=getattr(torch, self.dtype), device=self.device)
        return model if adapter is None else load_adapter(model, adapter, device=self.device)


def make_student(workspace: Workspace) -> Student:
    """The job's student, with the settings of its train section. Raises ModelInvalid."""
    settings = workspace.job.train
    dtype, device_kind = training_precision(settings.dtype, device=settings.device)
    return Student(
        model=workspace.student_model,
        dtype=dtype,
        device=resolve_device(settings.device),
        device_kind=device_kind,
        num_threads=settings.num_threads,
    )


def check_student(workspace: Workspace, *, data: str, fingerprint: str, vocab_size: int) -> None:
    """Refuse a student that cannot be trained on the targets of a corpus.

    Args:
        workspace: of the job.
        data: name of the targets, or of the teacher that will make them, for errors.
        fingerprint: of the tokenizer that they are made with.
        vocab_size: of their vocabulary.

    Raises:
        TokenizerMismatch: the student's tokenizer is another one.
        VocabularyMismatch: the student has no logit for some token.
        ModelInvalid: the student has fewer positions than the sequences.
    """
    student = workspace.student_model
    made_with = workspace.teacher_model.tokenizer
    check_tokenizer(student.tokenizer, model=student.name, data=data, data_fingerprint=fingerprint, made_with=made_with)
    check_context(student.folder, context_tokens=workspace.job.corpus.context_tokens)
    size = output_size(student.folder)
    check_vocabulary(model=student.name, model_size=size, data=data, data_size=vocab_size)


def check_adapter(model: Model, kind: AdapterKind, shape: LoraSettings) -> list[str]:
    """What an adapter of this kind leaves out of a model without a word, in sentences; mostly nothing.

    Raises:
        ModelInvalid: it is no causal language model, or cannot have such an adapter.
    """
    empty = load_empty_model(model.folder)
    share = expert_share(empty)
    output_parts(empty.get_output_embeddings(), model=model.name)
    attach_adapter(empty, kind, shape, seed=0)
    return [f"{model.name}: {share:.0%} of its weights are experts, which no adapter changes"] if share else []
