"""Errors that end the command with 75: something is unavailable for now, and the same command may succeed later."""

from __future__ import annotations

import errno

from softshard.errors.base import TryAgain

__all__ = [
    "DeviceFailed",
    "EngineFailed",
    "EngineNotOpened",
    "HubUnavailable",
    "LeaseLost",
    "OutputBusy",
    "SourceUnavailable",
    "Stopped",
    "StorageFull",
    "StoreUnavailable",
    "WorkerUnfit",
    "full_disk",
]


class OutputBusy(TryAgain):
    """Another run is using the same output."""

    def __init__(self, *, out: str, holder: str) -> None:
        self.out, self.holder = out, holder
        super().__init__(f"{out}: in use by {holder}; wait until it ends, or stop it, and run the same command again")


class LeaseLost(TryAgain):
    """This run did not renew its lease in time, and another run has taken over its output."""

    def __init__(self, *, out: str, other: str | None) -> None:
        self.out, self.other = out, other
        super().__init__(
            f"{out}: this run was suspended or cut off from its output, so {other or 'another run'} has taken over;"
            " parts that either has committed are kept; leave this one stopped"
        )


class EngineFailed(TryAgain):
    """An engine crashed, or ran out of memory, while scoring."""

    def __init__(self, *, engine: str, problem: str) -> None:
        self.engine, self.problem = engine, problem
        super().__init__(f"the {engine} engine failed: {problem}; committed parts are kept, run the job again")


class WorkerUnfit(TryAgain):
    """A process cannot do its work for a reason of its own; another process, or another machine, may do it."""

    def __init__(self, *, what: str, problem: str) -> None:
        self.what, self.problem = what, problem
        super().__init__(f"{what}: {problem}; make sure that its device, memory and ports are free, and try again")


class DeviceFailed(WorkerUnfit):
    """A device cannot be used, or failed while it computed."""

    def __init__(self, *, device: str, problem: str) -> None:
        self.device = device
        super().__init__(what=f"the device {device} cannot be used by this process", problem=problem)


class EngineNotOpened(WorkerUnfit):
    """An engine cannot be opened, for a reason that is not the job's."""

    def __init__(self, *, engine: str, problem: str) -> None:
        self.engine = engine
        super().__init__(what=f"the {engine} engine cannot be opened", problem=problem)


class Stopped(TryAgain):
    """A signal stopped the run; `finished` running tasks completed within the grace period, `dropped` ones did not."""

    def __init__(self, *, signal: str, finished: int, dropped: int) -> None:
        self.signal, self.finished, self.dropped = signal, finished, dropped
        super().__init__(
            f"stopped by {signal}: {finished} running tasks finished, {dropped} dropped; committed parts are kept,"
            " and the same command continues from there"
        )


class StoreUnavailable(TryAgain):
    """An object store did not answer, or asked to slow down, on every attempt."""

    def __init__(self, *, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(
            f"{uri}: the object store does not answer ({reason}); committed parts are kept, run the job again"
        )


class SourceUnavailable(TryAgain):
    """A source cannot be reached for now, or changed while it was read."""

    def __init__(self, *, source: str, uri: str, reason: str) -> None:
        self.source, self.uri, self.reason = source, uri, reason
        super().__init__(f"{uri}: source {source!r}: cannot be read for now ({reason}); run the same command again")


class HubUnavailable(TryAgain):
    """The hub that may have a model cannot be reached."""

    def __init__(self, *, model: str, reason: str, hint: str = "") -> None:
        self.model, self.reason, self.hint = model, reason, hint
        super().__init__(
            f"{model}: no such folder{hint}, and the hub cannot be reached for a model of this name ({reason}); run the"
            " same command again"
        )


class StorageFull(TryAgain):
    """The disk is full."""

    def __init__(self, *, uri: str) -> None:
        self.uri = uri
        super().__init__(
            f"{uri}: no space left on the device; free some space and run the job again, committed parts are kept"
        )


def full_disk(error: BaseException, *, uri: str | None = None) -> StorageFull | None:
    """The StorageFull to raise if a full disk is anywhere in an error's chain of causes, else None.

    Args:
        error: any exception.
        uri: the file or folder being written; None takes the file name from the cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return StorageFull(uri=uri or str(cause.filename or "a temporary file"))
        cause = cause.__cause__ or cause.__context__
    return None
