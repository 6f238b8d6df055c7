"""The student: the model that trainings adapt and that the report measures, with its data type and device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softshard.finetune.adapters.kinds import load_adapter
from softshard.models import load_model, resolve_device
from softshard.output.workspace import Model, Workspace
from softshard.teacher.style import training_precision

__all__ = ["Student", "make_student"]


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
