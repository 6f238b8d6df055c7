"""The output folder of a job: who owns it, and where each stage leaves what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from softshard.config import Job
from softshard.errors import JobInvalid, OutputForeign
from softshard.jobfile import load_job
from softshard.models import Tokenizer, load_tokenizer, resolve_model, weights_digest
from softshard.storage import LocalStore

__all__ = ["Model", "Workspace", "claim", "open_workspace", "owner_of"]

_STAGES = ("corpus", "retention", "teacher", "targets", "adapter", "report")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the job: its name there, and what is on the disk."""

    name: str
    folder: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.folder)

    @cached_property
    def weights(self) -> str:
        """Digest of its weights."""
        return weights_digest(self.folder)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A job and its output folder; one store a stage."""

    job: Job
    out: LocalStore

    @property
    def corpus(self) -> LocalStore:
        """Sequences of the corpus."""
        return self.out.below("corpus")

    @property
    def retention(self) -> LocalStore:
        """Sequences of the retention text."""
        return self.out.below("retention")

    @property
    def teacher(self) -> LocalStore:
        """Adapters of the style teacher."""
        return self.out.below("teacher")

    @property
    def targets(self) -> LocalStore:
        """Parts, receipts and manifests."""
        return self.out.below("targets")

    @property
    def adapter(self) -> LocalStore:
        """Trained adapters."""
        return self.out.below("adapter")

    @property
    def report(self) -> LocalStore:
        """The report."""
        return self.out.below("report")

    @cached_property
    def teacher_model(self) -> Model:
        """The teacher's model. Raises ModelInvalid."""
        settings = self.job.teacher
        return Model(name=settings.model, folder=resolve_model(settings.model, revision=settings.revision))

    @cached_property
    def student_model(self) -> Model:
        """The student's model. Raises ModelInvalid."""
        settings = self.job.train
        if settings.model is None:
            return self.teacher_model
        return Model(name=settings.model, folder=resolve_model(settings.model, revision=settings.revision))


def owner_of(out: str | Path) -> str | None:
    """Name of the job that an output folder belongs to; None if there is no folder or no job in it."""
    try:
        content = yaml.safe_load((Path(out) / "job.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def open_workspace(job: Job) -> Workspace:
    """The output folder of a job, if it is free or the job's own. Nothing is written yet.

    Raises:
        OutputForeign: the folder belongs to another job, or holds something else.
    """
    store = LocalStore(job.out)
    folder = store.local_path(".")
    owner = owner_of(folder)
    if owner is not None and owner != job.name:
        raise OutputForeign(out=job.out, owner=owner, job=job.name)
    if owner is None and folder.exists():
        strangers = (
            [item for item in folder.iterdir() if item.name not in {".tmp", *_STAGES}] if folder.is_dir() else [folder]
        )
        if strangers:
            raise OutputForeign(out=job.out, owner=None, job=job.name)
    return Workspace(job=job, out=store)


def claim(workspace: Workspace) -> None:
    """Write the job, defaults included, into its output folder, unless it says the same already.

    Raises:
        OutputUnusable: the folder cannot be written.
    """
    job, store = workspace.job, workspace.out
    if store.exists("job.yaml"):
        try:
            if load_job(store.local_path("job.yaml"), check_paths=False) == job:
                return
        except JobInvalid:
            pass  # of another version; replaced
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.replace("job.yaml", text.encode())
