"""The workers of a cluster as the queue sees them, and their health: started anew, retired, or none left.

A worker that cannot open its engine, or whose device fails, would take one task after the other from the queue and fail
with all of them. Its process is started anew, which cures a broken CUDA context and a port or memory that was taken for
a while. If it keeps failing while others work, it is retired; if no worker works, the run ends and may be tried again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from typing import Any, Protocol

from softshard.config import ClusterSettings
from softshard.errors import TryAgain

__all__ = ["WorkerHealth", "Workers"]

_FAILURES_IN_A_ROW = 3
_SECONDS_TO_COME_BACK = 120.0
"""A process that is started anew imports torch, and counts as present for this long."""


class Workers(Protocol):
    """What the queue needs of the cluster."""

    settings: ClusterSettings
    client: Any
    client_id: str

    def addresses(self) -> dict[str, str]:
        """Workers with the resource `teacher`, now: by address, a name that stays when the process is started anew.

        Raises TryAgain when the scheduler is lost.
        """

    def replenish(self) -> None:
        """Replace workers of a local cluster that Dask no longer restarts."""

    def restart(self, address: str) -> None:
        """Start the process of a worker anew, where it has a nanny that can."""

    def retire(self, address: str) -> None:
        """Take a worker out of the cluster."""

    def say(self, message: str) -> None:
        """One line for a person."""

    def warn(self, event: str, *, worker: str, reason: str, message: str) -> None:
        """The line for a person, and the event for logs."""


class WorkerHealth:
    """Which workers have failed for a reason of their own during one pass over the tasks."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._names: dict[str, str] = {}
        self._proven: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._restarted: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    def name(self, address: str) -> str:
        """A worker's name, which stays when its process is started anew; the address where the worker is gone."""
        if address not in self._names:
            self._names |= self._workers.addresses()
        return self._names.get(address, address)

    def others(self, avoid: Collection[str]) -> list[str]:
        """Addresses of the present workers, without those whose address or name is in `avoid`."""
        return [address for address, name in self._workers.addresses().items() if not {address, name} & set(avoid)]

    def was_ended(self, address: str) -> bool:
        """Whether this worker's process was ended on purpose, so that its loss is no task's fault."""
        return address in self._ended

    def succeeded(self, address: str) -> None:
        """A task has succeeded on a worker."""
        name = self.name(address)
        self._proven.add(name)
        self._failures.pop(name, None)

    def failed(self, address: str, reason: str) -> None:
        """A task has failed on a worker for a reason of the worker's: start it anew, or retire it.

        Raises:
            TryAgain: no worker is left that does not keep failing.
        """
        name, present, now = self.name(address), self._workers.addresses(), time.monotonic()
        is_ending = now - self._ended.get(address, -math.inf) < _SECONDS_TO_COME_BACK
        if is_ending or (address not in present and name != address):
            return  # one failure for each process
        self._failures[name] += 1
        keeps_failing = {each for each, number in self._failures.items() if number >= _FAILURES_IN_A_ROW}
        expected = {each for each, at in self._restarted.items() if now - at < _SECONDS_TO_COME_BACK}
        alive = set(present.values()) | expected
        if name in keeps_failing and alive <= keeps_failing:
            problem = f"no worker is left that works: {address} failed {self._failures[name]} times in a row, {reason}"
            raise TryAgain(f"{problem}; what is committed is kept, see the log of that worker, and run the job again")
        self._ended[address] = now
        if name in keeps_failing and alive & self._proven - keeps_failing:
            self._restarted.pop(name, None)
            del self._failures[name]
            message = f"warning: worker {address} keeps failing and is retired, the others go on: {reason}"
            self._workers.warn("worker_retired", worker=address, reason=reason, message=message)
            self._workers.retire(address)
        elif name != address:
            self._restarted[name] = now
            message = f"warning: worker {address} has failed and is started anew: {reason}"
            self._workers.warn("worker_restarted", worker=address, reason=reason, message=message)
            self._workers.restart(address)
        else:
            del self._ended[address]
