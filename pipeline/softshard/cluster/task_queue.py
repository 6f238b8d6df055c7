"""Tasks in flight: a bounded number at a time, what may pass tried again, what cannot set aside, drained on a signal.

In: a stream of tasks and a function for them. Out: each task's result, as it comes. Neither client nor scheduler holds
more than what is in flight, whatever the number of tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from softshard.cluster.retry import Attempt, failure_action, lost_worker, retry_delay_seconds
from softshard.cluster.signals import on_first_signal
from softshard.cluster.worker import run_task
from softshard.config import ClusterSettings
from softshard.errors import Stopped, TryAgain

__all__ = ["Execution", "TaskQueue", "Workers", "ignore_failure", "lost_scheduler"]

Task = TypeVar("Task")
Result = TypeVar("Result")

_PER_WORKER, _MOST_PER_WORKER = 2, 16
_SECONDS_AHEAD, _SECONDS_TOGETHER = 0.1, 0.05
"""Short tasks wait on their worker in such numbers that it has this much to do while the client hears and answers; it
answers what it hears within half of that together."""
_PATIENCE_SECONDS = 5.0
_SECONDS_WITHOUT_WORKERS = 300.0
_SECONDS_TO_FETCH, _SECONDS_TO_FETCH_ONE = 10.0, 1.0
"""Results are a few hundred bytes each."""
_SECONDS_OF_ONE_LOSS = 0.05
"""The tasks of a lost worker are reported at the same time, but heard one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a task came to its result."""

    worker: str
    """Address of the worker."""
    seconds: float
    """Time that the function took there."""
    attempt: int
    """1 for the first."""


class Workers(Protocol):
    """What the flight must know of the cluster."""

    settings: ClusterSettings
    client: Any
    run_id: str

    def addresses(self) -> list[str]:
        """Workers that offer the resource `teacher`, asked for anew. Raises TryAgain when the scheduler is lost."""

    def replenish(self) -> None:
        """Start workers of a local cluster anew that have ended for good."""

    def say(self, message: str) -> None:
        """One line for a person."""


def ignore_failure(task: object, attempt: int, reason: str) -> None:
    """What is done about a failure that nobody asked to hear of."""


class TaskQueue(Generic[Task, Result]):
    """One pass over a stream of tasks."""

    def __init__(
        self,
        workers: Workers,
        function: Callable[[Task], Result],
        *,
        name: Callable[[Task], str],
        on_result: Callable[[Task, Result, Execution], None],
        on_retry: Callable[[Task, int, str], None],
        on_set_aside: Callable[[Task, int, str], None],
    ) -> None:
        from distributed.protocol.pickle import dumps

        self._workers, self._settings, self._client = workers, workers.settings, workers.client
        self._name, self._on_result = name, on_result
        self._on_retry, self._on_set_aside = on_retry, on_set_aside
        # Pickled once here, and not unpickled by the scheduler, which then needs none of the modules that it names.
        self._function: bytes = dumps(function)
        self._dumps: Callable[[object], bytes] = dumps
        self._orders = itertools.count()
        self._flying: dict[str, Attempt[Task]] = {}
        self._pausing: list[tuple[float, int, Attempt[Task]]] = []
        self._landed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.failures: dict[str, str] = {}
        self.is_paused = False
        self._signal: str | None = None
        self._finished = self._dropped = 0
        self._mean_seconds = math.inf
        self._counted, self._counted_at = 1, -math.inf
        self._alone_since: float | None = None
        self._settled_at = -math.inf

    def run(self, tasks: Iterable[Task]) -> dict[str, str]:
        """Run the function over all tasks; names and reasons of those that were set aside. Raises as Cluster.run."""
        for _ in self.rounds(tasks):
            pass
        return self.failures

    def rounds(self, tasks: Iterable[Task]) -> Iterator[None]:
        """The same, a step after each round of results that were handed on. No more is taken while `is_paused`."""
        waiting = iter(tasks)
        landed: list[str] = []
        try:
            with on_first_signal(self._hear_signal):
                # Workers get their next tasks at once; the results of the last ones are fetched together.
                while self._take_off(waiting, num_landed=len(landed)):
                    self._settle(landed)
                    if self._signal is not None:
                        self._drain(self._signal)
                    yield
                    landed = self._next_landed()
        finally:
            for attempt in self._flying.values():
                attempt.future.release()

    def _hear_signal(self, name: str) -> None:
        self._signal = name
        self._landed.put(None)

    def _take_off(self, waiting: Iterator[Task], *, num_landed: int) -> bool:
        """Start what is due and what there is room for; False when nothing is left.

        `num_landed` of those in flight are done and have only to be settled.
        """
        if self._signal is not None:
            return True
        room, now = self._room(), time.monotonic()
        starting: list[Attempt[Task]] = []
        while self._pausing and self._pausing[0][0] <= now:
            starting.append(heapq.heappop(self._pausing)[2])
        # Tasks that pause take no room, or a worker would pause with them; but no more than that many may, or an
        # outage would take in the whole stream.
        if len(self._pausing) < room and not self.is_paused:
            fresh = itertools.islice(waiting, max(0, room + num_landed - len(self._flying) - len(starting)))
            starting += [Attempt(task=task, name=self._name(task)) for task in fresh]
        self._send([attempt for attempt in starting if not attempt.avoid])
        for attempt in starting:
            if attempt.avoid:
                self._send([attempt], workers=[one for one in self._workers.addresses() if one not in attempt.avoid])
        return bool(self._flying or self._pausing)

    def _room(self) -> int:
        """Tasks that may be in flight: at least those of one worker, so that something waits for the first."""
        now = time.monotonic()
        if now - self._counted_at > _PATIENCE_SECONDS:
            self._workers.replenish()
            self._counted, self._counted_at = max(1, len(self._workers.addresses())), now
        ahead = 1 + math.ceil(_SECONDS_AHEAD / max(self._mean_seconds, 1e-3))
        return self._counted * min(max(_PER_WORKER, ahead), _MOST_PER_WORKER)

    def _send(self, attempts: Sequence[Attempt[Task]], *, workers: Sequence[str] = ()) -> None:
        """Submit attempts in one message, to some workers rather than to others where some are named."""
        if not attempts:
            return
        orders, keys = [], []
        for attempt in attempts:
            attempt.order = next(self._orders)
            orders.append((self._workers.run_id, self._function, self._dumps(attempt.task)))
            keys.append(f"{attempt.name}-{attempt.order}-{self._workers.run_id}")
        choice = {"workers": list(workers), "allow_other_workers": True} if workers else {}
        futures = self._client.map(run_task, orders, key=keys, pure=False, resources={"teacher": 1}, **choice)
        for attempt, key, future in zip(attempts, keys, futures, strict=True):
            attempt.future = future
            self._flying[key] = attempt
            future.add_done_callback(lambda done: self._landed.put(done.key))

    def _next_landed(self) -> list[str]:
        """Keys that are done; waits for one, but not for a scheduler or for workers that are gone."""
        if not self._flying and not self._pausing:
            return []
        pause = self._pausing[0][0] - time.monotonic() if self._pausing else math.inf
        try:
            landed = [self._landed.get(timeout=max(0.0, min(pause, _PATIENCE_SECONDS)))]
        except queue.Empty:
            self._refuse_if_alone()
            return []
        landed += self._also_landed()
        # Workers have enough to do meanwhile, and a message about several tasks costs little more than about one.
        end = self._settled_at + _SECONDS_TOGETHER
        while None not in landed and 2 * len(landed) < len(self._flying) and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                landed.append(self._landed.get(timeout=left))
        return [key for key in landed if key is not None and key in self._flying]

    def _also_landed(self) -> Iterator[str | None]:
        while True:
            try:
                yield self._landed.get_nowait()
            except queue.Empty:
                return

    def _refuse_if_alone(self) -> None:
        now = time.monotonic()
        if self._workers.addresses():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since >= _SECONDS_WITHOUT_WORKERS:
            raise TryAgain("the cluster has had no worker with the resource `teacher=1` for five minutes")

    def _settle(self, landed: list[str]) -> None:
        """Hand on results, try again or set aside what failed."""
        self._settled_at = time.monotonic()
        errors: dict[str, BaseException] = {}
        for key, outcome in self._outcomes(landed).items():
            if isinstance(outcome, BaseException):
                errors[key] = outcome
                continue
            attempt = self._flying.pop(key)
            result, worker, seconds = outcome
            self._mean_seconds = seconds if self._mean_seconds == math.inf else 0.8 * self._mean_seconds + 0.2 * seconds
            self._finished += self._signal is not None
            self._on_result(attempt.task, result, Execution(worker=worker, seconds=seconds, attempt=attempt.number))
        if any(lost_worker(error) for error in errors.values()):
            time.sleep(_SECONDS_OF_ONE_LOSS)
            others = [key for key in self._also_landed() if key in self._flying and key not in errors]
            errors |= {key: e for key, e in self._outcomes(others).items() if isinstance(e, BaseException)}
            for key in set(others) - set(errors):
                self._landed.put(key)
        self._settle_errors(errors)

    def _outcomes(self, keys: Iterable[str]) -> dict[str, Any]:
        """What each task came to: an error, or its result with worker and seconds. Raises TryAgain.

        A task whose result was lost with its worker before it was fetched has come to nothing, and is sent again.
        """
        futures = {key: self._flying[key].future for key in keys}
        if any(future.status == "cancelled" for future in futures.values()):
            raise lost_scheduler()
        outcomes: dict[str, Any] = {key: f.exception() for key, f in futures.items() if f.status == "error"}
        there = {key: future for key, future in futures.items() if future.status == "finished"}
        outcomes |= self._fetch(there)
        self._send_again([key for key in futures if key not in outcomes])
        return outcomes

    def _fetch(self, futures: dict[str, Any]) -> dict[str, Any]:
        """Results, or errors, of finished tasks; without those that workers have taken with them.

        Dask waits for a lost result until the task was done again. That takes what it takes, and nothing else is
        settled or started meanwhile.
        """
        try:
            return self._gather(futures, _SECONDS_TO_FETCH) if futures else {}
        except TimeoutError:
            found: dict[str, Any] = {}
            for key, future in futures.items():
                with contextlib.suppress(TimeoutError):
                    found |= self._gather({key: future}, _SECONDS_TO_FETCH_ONE)
            return found

    def _gather(self, futures: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Results, or errors, in so many seconds. Raises TimeoutError, and TryAgain where the scheduler is lost."""

        async def gather() -> dict[str, Any]:
            try:
                found: dict[str, Any] = await self._client.gather(futures, errors="skip", asynchronous=True)
            except asyncio.CancelledError as error:
                # Dask gives up so too, when a connection to a worker ends under it, and would not get to say it.
                raise TimeoutError from error
            return found

        try:
            gathered = self._client.sync(gather, callback_timeout=seconds)
        except TimeoutError:
            raise
        except OSError as error:
            raise lost_scheduler() from error
        lost = {key for key, result in gathered.items() if result is None and futures[key].status != "error"}
        return {
            key: futures[key].exception() if result is None else result
            for key, result in gathered.items()
            if key not in lost
        }

    def _send_again(self, keys: Iterable[str]) -> None:
        """Start tasks anew that have not failed; on a signal they are dropped."""
        gone = [self._flying.pop(key) for key in keys]
        for attempt in gone:
            attempt.future.release()
        if self._signal is None:
            self._send(gone)
        else:
            self._dropped += len(gone)

    def _settle_errors(self, errors: dict[str, BaseException]) -> None:
        """Of the tasks that a lost worker takes with it, only the first, which it had begun, has failed."""
        blamed: set[str] = set()
        for key, error in sorted(errors.items(), key=lambda item: self._flying[item[0]].order):
            attempt = self._flying.pop(key)
            worker = lost_worker(error)
            if self._signal is not None:
                self._dropped += 1
            elif worker is not None and worker in blamed:
                self._pause(attempt, 0.0)
            else:
                self._failed(attempt, error)
            blamed |= {worker} if worker else set()
            attempt.future.release()

    def _failed(self, attempt: Attempt[Task], error: BaseException) -> None:
        remedy, worker = failure_action(error), lost_worker(error)
        if remedy == "none":
            raise error
        what = f"its worker {worker} was lost" if worker else f"{error}"
        reason = f"{type(error).__name__}: {what} (attempt {attempt.number})"
        if remedy == "aside" or attempt.number >= self._settings.max_attempts:
            self.failures[attempt.name] = reason
            self._on_set_aside(attempt.task, attempt.number, reason)
            return
        self._on_retry(attempt.task, attempt.number, reason)
        # The worker of an error that it has lived through is its last note.
        attempt.avoid |= {worker} if worker else set(getattr(error, "__notes__", ())[-1:])
        pause = retry_delay_seconds(attempt.name, attempt.number, base=self._settings.retry_seconds)
        attempt.number += 1
        self._pause(attempt, pause)

    def _pause(self, attempt: Attempt[Task], seconds: float) -> None:
        heapq.heappush(self._pausing, (time.monotonic() + seconds, attempt.order, attempt))

    def _drain(self, name: str) -> None:
        """Wait for what has been begun, as long as there is grace, and let go of the rest. Raises Stopped."""
        grace = self._settings.grace_seconds
        deadline = time.monotonic() + grace
        begun = self._begun()
        self._client.cancel([self._flying.pop(key).future for key in set(self._flying) - begun])
        if self._flying:
            left = f"{len(self._flying)} task(s) in hand may take {grace:g} s to finish"
            self._workers.say(f"{name}: {left}; a second signal ends the run at once")
        while self._flying and (left_seconds := deadline - time.monotonic()) > 0:
            try:
                landed = self._landed.get(timeout=min(left_seconds, _PATIENCE_SECONDS))
            except queue.Empty:
                self._refuse_if_alone()
                continue
            self._settle([landed] if landed in self._flying else [])
        self._dropped += len(self._flying)
        raise Stopped(signal=name, finished=self._finished, dropped=self._dropped)

    def _begun(self) -> set[str]:
        """Keys that a worker has begun; all that are in flight, if workers do not say so at once."""
        try:
            stacks = self._client.sync(self._client.scheduler.call_stack, keys=None, callback_timeout=_PATIENCE_SECONDS)
        except (OSError, TimeoutError):
            return set(self._flying)
        return set(self._flying) & {key for keys in stacks.values() for key in keys}


def lost_scheduler() -> TryAgain:
    """The error of a run whose scheduler is gone."""
    return TryAgain("the connection to the Dask scheduler is lost; what is committed is kept, run the job again")
