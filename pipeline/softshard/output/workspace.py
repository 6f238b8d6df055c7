"""The output folder of a job: the job that owns it, and the folder of each stage in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from softshard.config import Job
from softshard.config.job_file import parse_job, parse_values
from softshard.errors import JobInvalid, OutputForeign, OutputUnusable
from softshard.models import (
    Tokenizer,
    expert_share,
    load_empty_model,
    load_tokenizer,
    resolve_model,
    weights_digest,
)
from softshard.storage import Store, open_store

__all__ = ["Model", "Workspace", "claim", "open_workspace", "read_owner", "saved_job"]

_JOB_FILE = "job.yaml"
_OURS = {".lease", "corpus", "retention", "teacher", "targets", "adapter", "report"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that the job names, and its folder on disk."""

    name: str
    """As the job names it."""
    folder: Path

    @property
    def hub_name(self) -> str | None:
        """Its name on the hub; None for a folder that the job names."""
        return None if Path(self.name).expanduser().is_dir() else self.name

    @property
    def title(self) -> str:
        """Its name for other people: on the hub, or of its folder, without the path to it."""
        return self.hub_name or self.folder.absolute().name

    @property
    def location(self) -> str:
        """Where a program finds it, whatever folder that runs in: its name on the hub, or an absolute path."""
        return self.hub_name or str(self.folder.absolute())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.folder)

    @cached_property
    def expert_share(self) -> float:
        """Share of its weights that are experts."""
        return expert_share(load_empty_model(self.folder))

    @cached_property
    def weights(self) -> str:
        """Digest of its weights."""
        return weights_digest(self.folder)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A job and its output folder, with one store per stage."""

    job: Job
    out: Store

    @property
    def corpus(self) -> Store:
        """Sequences of the corpus."""
        return self.out.below("corpus")

    @property
    def retention(self) -> Store:
        """Sequences of the retention text."""
        return self.out.below("retention")

    @property
    def teacher(self) -> Store:
        """Adapters of the style teacher."""
        return self.out.below("teacher")

    @property
    def targets(self) -> Store:
        """Parts, receipts and manifests."""
        return self.out.below("targets")

    @property
    def adapter(self) -> Store:
        """Trained adapters."""
        return self.out.below("adapter")

    @property
    def report(self) -> Store:
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


def read_owner(out: str | Path) -> str | None:
    """Name of the job that an output belongs to; None if there is no output or no job in it."""
    return _name_in(open_store(out))


def _name_in(store: Store) -> str | None:
    try:
        values = parse_values(store.read(_JOB_FILE))
    except OSError:
        return None
    return None if values is None else str(values["name"])


def saved_job(store: Store, *, check_paths: bool = False) -> Job:
    """The job that last ran in an output, from its `job.yaml`.

    With `check_paths`, its sources and models must still exist.

    Raises:
        JobInvalid: there is no `job.yaml`, or not one of this version.
    """
    file = f"{store.uri}/{_JOB_FILE}"
    try:
        content = store.read(_JOB_FILE)
    except OSError as error:
        raise JobInvalid(file=file, place="", problem="cannot be read: there is no output of softshard here") from error
    return parse_job(content, file=file, check_paths=check_paths)


def open_workspace(job: Job) -> Workspace:
    """The output of a job, which must be empty or belong to the job. Nothing is written yet.

    Raises:
        OutputForeign: it belongs to another job, or holds other files.
        OutputUnusable: the folder cannot be read.
        JobInvalid: `out` is neither a folder nor a bucket.
        StoreUnavailable, StoreUnusable: of an object store.
    """
    store = open_store(job.out)
    owner = _name_in(store)
    if owner is not None and owner != job.name:
        raise OutputForeign(out=job.out, owner=owner, job=job.name)
    if owner is None and _holds_something_else(store):
        raise OutputForeign(out=job.out, owner=None, job=job.name)
    return Workspace(job=job, out=store)


def _holds_something_else(store: Store) -> bool:
    try:
        return bool(set(store.names(".")) - _OURS)
    except NotADirectoryError:
        return True
    except OSError as error:
        raise OutputUnusable(uri=store.uri, problem=error.strerror or str(error)) from error


def claim(workspace: Workspace) -> None:
    """Write the job, defaults included, to `job.yaml` in its output, unless that says the same already.

    Raises:
        OutputUnusable: the folder cannot be written.
        StoreUnavailable, StoreUnusable: of an object store.
    """
    job, store = workspace.job, workspace.out
    if store.exists(_JOB_FILE):
        try:
            if saved_job(store) == job:
                return
        except JobInvalid:
            pass  # of another version; replaced
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.replace(_JOB_FILE, text.encode())
