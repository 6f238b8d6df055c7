"""One attempt at a task: what may be tried again after it has failed, and when."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from softshard.errors import DataInvalid, SoftshardError, StorageFull, TryAgain
from softshard.models import out_of_memory

__all__ = ["Attempt", "failure_action", "lost_worker", "retry_delay_seconds"]

Task = TypeVar("Task")
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt(Generic[Task]):
    """A task that is in flight or waits to be."""

    task: Task
    name: str
    number: int = 1
    order: int = 0
    """Place among all submissions; a worker starts its tasks in this order."""
    avoid: set[str] = field(default_factory=set)
    """Workers on which it has failed."""
    future: Any = None


def retry_delay_seconds(name: str, number: int, *, base: float) -> float:
    """Pause after the failed attempt `number` of a task: `base`, doubled with each further one, at most a minute; of
    that between half and all, by a hash of the task, so that those that failed together do not return together."""
    digest = hashlib.blake2b(f"{name} {number}".encode(), digest_size=8).digest()
    longest = min(base * 2.0 ** (number - 1), _LONGEST_PAUSE_SECONDS)
    return longest * (0.5 + 0.5 * int.from_bytes(digest, "big") / 2**64)


def lost_worker(error: BaseException) -> str | None:
    """Address of the worker whose loss an error is; None for any other error."""
    from distributed import KilledWorker

    return str(error.last_worker.address) if isinstance(error, KilledWorker) else None


def failure_action(error: BaseException) -> Literal["again", "aside", "none"]:
    """What is to be done about a failed task: try it again, for the reason may pass; set it aside, for its data is
    wrong; or end the run, for a bug, or a full disk, which would only be filled further."""
    if isinstance(error, StorageFull):
        return "none"
    if isinstance(error, SoftshardError):
        return "again" if isinstance(error, TryAgain) else "aside" if isinstance(error, DataInvalid) else "none"
    may_pass = lost_worker(error) is not None or isinstance(error, OSError) or out_of_memory(error)
    return "again" if may_pass else "none"
