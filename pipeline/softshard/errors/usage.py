"""Errors that end the command with 2: the job file or an argument is wrong, or names something that cannot be used."""

from __future__ import annotations

from softshard.errors.base import EXIT_JOB, SoftshardError

__all__ = [
    "ChatTemplateInvalid",
    "DeviceMissing",
    "EngineMissing",
    "ExtraMissing",
    "FolderTaken",
    "JobInvalid",
    "ManifestMissing",
    "ModelMissing",
    "OutputForeign",
    "OutputUnusable",
    "PackageMissing",
    "ShardedTwice",
    "StoreUnusable",
]


class JobInvalid(SoftshardError):
    """The job file or an argument is wrong."""

    exit_code = EXIT_JOB

    def __init__(self, *, file: str, place: str, problem: str) -> None:
        self.file, self.place, self.problem = file, place, problem
        super().__init__(f"{file}: {place}: {problem}" if place else f"{file}: {problem}")


class ChatTemplateInvalid(SoftshardError):
    """Conversations have no chat template to be rendered with, or one that is not a template."""

    exit_code = EXIT_JOB

    def __init__(self, *, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"corpus.chat_template: {problem}; give `chat_template` the text of a Jinja template, or the path of a file"
        )


class DeviceMissing(SoftshardError):
    """The job names a CUDA device that torch does not see in this process."""

    exit_code = EXIT_JOB

    def __init__(self, *, setting: str, device: str, num_devices: int) -> None:
        self.setting, self.device, self.num_devices = setting, device, num_devices
        seen = f"{num_devices} CUDA device(s)" if num_devices else "no CUDA device"
        last = f", or one up to `cuda:{num_devices - 1}`" if num_devices else ""
        super().__init__(f"{setting}: {device}: torch sees {seen} here; set `device: auto` or `device: cpu`{last}")


class PackageMissing(SoftshardError):
    """A model is quantised, and a package that it needs is not installed; `problem` is what transformers says."""

    exit_code = EXIT_JOB

    def __init__(self, *, setting: str, model: str, method: str, problem: str) -> None:
        self.setting, self.model, self.method, self.problem = setting, model, method, problem
        super().__init__(
            f"{setting}: {model}: is quantised ({method}) and needs a package that is not installed: {problem};"
            " install it, or use a model that is not quantised"
        )


class EngineMissing(SoftshardError):
    """The job names an engine that is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, engine: str) -> None:
        self.engine = engine
        super().__init__(
            f"teacher.engine: {engine} is not installed; install softshard[{engine}], or set `engine: transformers`"
        )


class ExtraMissing(SoftshardError):
    """A feature needs an optional package that is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, what: str, package: str, extra: str, remedy: str = "") -> None:
        self.what, self.package, self.extra = what, package, extra
        alternative = f", or {remedy}" if remedy else ""
        super().__init__(f"{what}: {package} is not installed; install softshard[{extra}]{alternative}")


class FolderTaken(SoftshardError):
    """The destination folder exists and is not empty."""

    exit_code = EXIT_JOB

    def __init__(self, *, folder: str) -> None:
        self.folder = folder
        super().__init__(f"{folder}: already exists, and nothing in it is overwritten; name another folder")


class ModelMissing(SoftshardError):
    """The folder that is named as a model does not exist."""

    exit_code = EXIT_JOB

    def __init__(self, *, model: str, hint: str = "") -> None:
        self.model, self.hint = model, hint
        super().__init__(f"{model}: no such folder{hint}; name a model's folder, or a model on the hub")


class OutputForeign(SoftshardError):
    """The output folder belongs to another job, or holds files that softshard did not write."""

    exit_code = EXIT_JOB

    def __init__(self, *, out: str, owner: str | None, job: str) -> None:
        self.out, self.owner, self.job = out, owner, job
        problem = "holds other files and no job.yaml"
        if owner:
            problem = f"belongs to job {owner!r}, and this job's name is {job!r}"
        super().__init__(f"{out}: this folder {problem}; set `out` to another folder")


class OutputUnusable(SoftshardError):
    """The output folder cannot be written to."""

    exit_code = EXIT_JOB

    def __init__(
        self, *, uri: str, problem: str, setting: str = "out", instead: str = "a folder that can be written to"
    ) -> None:
        self.uri, self.problem, self.setting, self.instead = uri, problem, setting, instead
        super().__init__(f"{uri}: cannot be written: {problem}; set `{setting}` to {instead}")


class StoreUnusable(SoftshardError):
    """An object store refuses a request, or ignores a condition that commits rely on."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: the object store cannot be used: {problem}")


class ManifestMissing(SoftshardError):
    """The input of a stage is missing, incomplete, or was made with other settings."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, stage: str) -> None:
        self.uri, self.stage = uri, stage
        problem = f"missing or made with other settings, so the {stage} stage is not complete"
        super().__init__(f"{uri}: {problem}; run `softshard {stage} JOB.yaml`")


class ShardedTwice(SoftshardError):
    """accelerate would shard batches over ranks that the dataset has already sharded, so most data would be skipped."""

    exit_code = EXIT_JOB

    def __init__(self, *, wrapper: str, num_processes: int) -> None:
        self.wrapper, self.num_processes = wrapper, num_processes
        super().__init__(
            f"accelerate's {wrapper} would shard the batches over {num_processes} processes, but this dataset has"
            " already sharded them over ranks, so most data would be skipped; do not pass its loader to"
            " `accelerator.prepare`, and put `SoftLabelTraining` before Trainer in the list of base classes"
        )
