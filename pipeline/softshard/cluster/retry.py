"""The retry policy: which failed tasks are tried again and after what delay, are set aside, or end the run."""

from __future__ import annotations

import hashlib
from typing import Literal

from softshard.errors import DataInvalid, SoftshardError, StorageFull, TryAgain, WorkerUnfit
from softshard.models import device_failed, out_of_memory

__all__ = ["FailureAction", "failure_action", "lost_worker", "retry_delay_seconds"]

FailureAction = Literal["retry", "blame_worker", "set_aside", "fail"]
_LONGEST_DELAY_SECONDS = 60.0


def failure_action(error: BaseException) -> FailureAction:
    """How the queue reacts to a failed task.

    `retry`: the cause may be temporary. `blame_worker`: it is the worker's own, another one may execute the task.
    `set_aside`: the task's data is wrong, the other tasks go on. `fail`: the error ends the run, because it
    is a bug, or because the disk is full and further tasks would only fill it more.
    """
    if isinstance(error, StorageFull):
        return "fail"
    if isinstance(error, WorkerUnfit) or device_failed(error):
        return "blame_worker"
    if isinstance(error, SoftshardError):
        return "retry" if isinstance(error, TryAgain) else "set_aside" if isinstance(error, DataInvalid) else "fail"
    is_temporary = lost_worker(error) is not None or isinstance(error, OSError) or out_of_memory(error)
    return "retry" if is_temporary else "fail"


def lost_worker(error: BaseException) -> str | None:
    """Address of the worker whose loss caused the error; None where no loss did."""
    from distributed import KilledWorker

    return str(error.last_worker.address) if isinstance(error, KilledWorker) else None


def retry_delay_seconds(name: str, attempt: int, *, base: float) -> float:
    """Delay before a task is tried again whose attempt with this number (from 1) has failed.

    The upper bound is `base`, doubled with each further attempt, at most a minute. The delay is between half of it and
    all of it, by a hash of the task's name, so that tasks that failed together do not return together.
    """
    digest = hashlib.blake2b(f"{name} {attempt}".encode(), digest_size=8).digest()
    longest = min(base * 2.0 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
    return longest * (0.5 + 0.5 * int.from_bytes(digest, "big") / 2**64)
