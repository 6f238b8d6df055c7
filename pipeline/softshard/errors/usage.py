"""Errors that end the command with 2: the job file, the arguments, or what they name cannot be used."""

from __future__ import annotations

from softshard.errors.base import EXIT_JOB, SoftshardError

__all__ = [
    "EngineMissing",
    "ExtraMissing",
    "FolderTaken",
    "JobInvalid",
    "ManifestMissing",
    "OutputForeign",
    "OutputUnusable",
    "ShardedTwice",
    "StoreUnusable",
]


class JobInvalid(SoftshardError):
    """The job file or an argument is wrong."""

    exit_code = EXIT_JOB

    def __init__(self, *, file: str, place: str, problem: str) -> None:
        self.file, self.place, self.problem = file, place, problem
        super().__init__(f"{file}: {place}: {problem}" if place else f"{file}: {problem}")


class EngineMissing(SoftshardError):
    """The job names an engine that is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, engine: str) -> None:
        self.engine = engine
        super().__init__(
            f"teacher.engine: {engine} is not installed here; install softshard[{engine}],"
            " or use `engine: transformers`"
        )


class ExtraMissing(SoftshardError):
    """Something was asked for that an optional package does, and the package is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, what: str, package: str, extra: str, remedy: str = "") -> None:
        self.what, self.package, self.extra = what, package, extra
        way_out = f", or {remedy}" if remedy else ""
        super().__init__(f"{what}: {package} is not installed here; install softshard[{extra}]{way_out}")


class FolderTaken(SoftshardError):
    """Something was to be written to a folder in which there is something already."""

    exit_code = EXIT_JOB

    def __init__(self, *, folder: str) -> None:
        self.folder = folder
        super().__init__(f"{folder}: is there already, and nothing is written over it; name another folder")


class OutputForeign(SoftshardError):
    """The output folder belongs to another job, or to something else altogether."""

    exit_code = EXIT_JOB

    def __init__(self, *, out: str, owner: str | None, job: str) -> None:
        self.out, self.owner, self.job = out, owner, job
        whose = f"belongs to job {owner!r}" if owner else "is not empty and holds no job.yaml of softshard"
        super().__init__(f"{out}: this folder {whose}, not to job {job!r}; give `out` another folder")


class OutputUnusable(SoftshardError):
    """The output folder cannot be written."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, problem: str, setting: str = "out") -> None:
        self.uri, self.problem, self.setting = uri, problem, setting
        super().__init__(f"{uri}: cannot be written: {problem}; give `{setting}` a folder on a disk that can be")


class StoreUnusable(SoftshardError):
    """An object store refuses what is asked of it, or does not do it."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: the object store cannot be used: {problem}")


class ManifestMissing(SoftshardError):
    """A stage was asked for whose input is not complete, or was made with other settings."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, stage: str) -> None:
        self.uri, self.stage = uri, stage
        problem = f"not there, or made with other settings, so the {stage} stage is not complete"
        super().__init__(f"{uri}: {problem}; run `softshard {stage} JOB.yaml`")


class ShardedTwice(SoftshardError):
    """Batches that are dealt to ranks already would be dealt again, so that each rank would see a part of its own."""

    exit_code = EXIT_JOB

    def __init__(self, *, wrapper: str, num_processes: int) -> None:
        self.wrapper, self.num_processes = wrapper, num_processes
        super().__init__(
            f"accelerate's {wrapper} would deal batches to {num_processes} processes that are dealt to ranks already,"
            " and only some of the data would be seen; do not give this data set's loader to `accelerator.prepare`,"
            " and put `SoftLabelTraining` before Trainer"
        )
