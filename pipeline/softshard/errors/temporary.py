"""Errors that end the command with 75: something passed away that may be there again later."""

from __future__ import annotations

import errno

from softshard.errors.base import TryAgain

__all__ = [
    "EngineFailed",
    "LeaseLost",
    "OutputBusy",
    "Stopped",
    "StorageFull",
    "StoreUnavailable",
    "full_disk",
]


class OutputBusy(TryAgain):
    """Another run works on the same output."""

    def __init__(self, *, out: str, holder: str) -> None:
        self.out, self.holder = out, holder
        super().__init__(f"{out}: {holder} works here; wait for its end, or stop it, and start again")


class LeaseLost(TryAgain):
    """This run was taken for dead, and another works on its output now."""

    def __init__(self, *, out: str, other: str | None) -> None:
        self.out, self.other = out, other
        super().__init__(
            f"{out}: this run stood still, or was cut off from its output, so {other or 'another run'} has taken over;"
            " what both have committed is kept, and never mixed"
        )


class EngineFailed(TryAgain):
    """An engine ended in the middle of its work."""

    def __init__(self, *, engine: str, problem: str) -> None:
        self.engine, self.problem = engine, problem
        super().__init__(f"the {engine} engine failed: {problem}; what is committed is kept, run the job again")


class Stopped(TryAgain):
    """A signal asked the run to stop; `finished` tasks were ended in the time it had, `dropped` ones were cut off."""

    def __init__(self, *, signal: str, finished: int, dropped: int) -> None:
        self.signal, self.finished, self.dropped = signal, finished, dropped
        super().__init__(
            f"stopped by {signal}: of the tasks in hand {finished} finished and {dropped} dropped; what is committed"
            " is kept, and the same command goes on from there"
        )


class StoreUnavailable(TryAgain):
    """An object store has not answered, or asks for patience, in all attempts."""

    def __init__(self, *, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(
            f"{uri}: the object store does not answer ({reason}); what is committed is kept, run the job again"
        )


class StorageFull(TryAgain):
    """The disk is full."""

    def __init__(self, *, uri: str) -> None:
        self.uri = uri
        super().__init__(
            f"{uri}: no space left on the device; free some and run the job again, nothing written is lost"
        )


def full_disk(error: BaseException, *, uri: str | None = None) -> StorageFull | None:
    """What to raise where a full disk is the cause of an error, or the cause of its cause; None where it is not.

    Args:
        error: any.
        uri: what was to be written; None: as the cause says.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return StorageFull(uri=uri or str(cause.filename or "a file for temporary use"))
        cause = cause.__cause__ or cause.__context__
    return None
