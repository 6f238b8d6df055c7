"""A queue of tasks for a Dask cluster: bounded in flight, with retries, setting aside, and draining on a signal.

It takes a stream of tasks and a function, and hands on each task's result as it arrives. Neither client nor scheduler
holds more than the tasks in flight, whatever the length of the stream.
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
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from softshard.cluster.retry import failure_action, lost_worker, retry_delay_seconds
from softshard.cluster.signals import on_first_signal
from softshard.cluster.worker import run_task
from softshard.cluster.workers import WorkerHealth, Workers
from softshard.errors import EngineNotOpened, Stopped, TryAgain

__all__ = ["Execution", "TaskQueue", "ignore_failure", "lost_scheduler"]

Task = TypeVar("Task")
Result = TypeVar("Result")

_PER_WORKER, _MOST_PER_WORKER = 2, 16
_SECONDS_AHEAD, _SECONDS_TOGETHER = 0.1, 0.05
"""Short tasks are queued on their worker in such numbers that it has 0.1 s of work while the client handles results,
which the client collects for at most half of that time."""
_POLL_SECONDS = 5.0
_SECONDS_WITHOUT_WORKERS = 300.0
_SECONDS_TO_FETCH, _SECONDS_TO_FETCH_SINGLE = 10.0, 1.0
"""A result is a few hundred bytes."""
_SECONDS_OF_A_LOSS = 0.05
"""The errors of a lost worker's tasks are sent at the same time and arrive one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where, how fast and at which attempt a task was executed."""

    worker: str
    """Address of the worker."""
    seconds: float
    """Time that the function took."""
    attempt: int
    """From 1."""


def ignore_failure(task: object, attempt: int, reason: str) -> None:
    """The callback for failures that the caller does not handle."""


@dataclass(slots=True, kw_only=True, eq=False)
class _QueuedTask(Generic[Task]):
    """A task that is in flight or waits for its next attempt."""

    task: Task
    name: str
    attempt: int = 1
    submission: int = 0
    """Place among all submissions; a worker executes its tasks in this order."""
    avoid: set[str] = field(default_factory=set)
    """Addresses of workers on which it has failed, and names of those whose fault that was."""
    future: Any = None


class TaskQueue(Generic[Task, Result]):
    """One pass over a stream of tasks; see `Cluster.map_tasks` for the arguments and guarantees."""

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
        self._health = WorkerHealth(workers)
        self._name, self._on_result = name, on_result
        self._on_retry, self._on_set_aside = on_retry, on_set_aside
        # Pickled here once and not unpickled by the scheduler, which therefore needs none of the function's modules.
        self._function: bytes = dumps(function)
        self._dumps: Callable[[object], bytes] = dumps
        self._submissions = itertools.count()
        self._in_flight: dict[str, _QueuedTask[Task]] = {}
        self._retries: list[tuple[float, int, _QueuedTask[Task]]] = []
        self._done_keys: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.failures: dict[str, str] = {}
        self.is_paused = False
        self._signal: str | None = None
        self._finished = self._dropped = 0
        self._mean_seconds = math.inf
        self._num_workers, self._num_workers_at = 1, -math.inf
        self._no_workers_since: float | None = None
        self._handled_at = -math.inf

    def run(self, tasks: Iterable[Task]) -> dict[str, str]:
        """Execute all tasks; returns the names of those that were set aside, with the reasons."""
        for _ in self.iterate(tasks):
            pass
        return self.failures

    def iterate(self, tasks: Iterable[Task]) -> Iterator[None]:
        """Execute all tasks, yielding after each batch of results; takes no further tasks while `is_paused`."""
        waiting = iter(tasks)
        done: list[str] = []
        try:
            with on_first_signal(self._on_signal):
                # Workers get their next tasks first; then the results of the previous ones are fetched together.
                while self._submit_ready(waiting, num_done=len(done)):
                    self._handle_results(done)
                    if self._signal is not None:
                        self._drain(self._signal)
                    yield
                    done = self._wait_for_done()
        finally:
            for entry in self._in_flight.values():
                entry.future.release()

    def _on_signal(self, name: str) -> None:
        self._signal = name
        self._done_keys.put(None)

    def _submit_ready(self, waiting: Iterator[Task], *, num_done: int) -> bool:
        """Submit retries that are due, and new tasks while there is room; False when nothing is left.

        `num_done` of the tasks in flight are done, with results still to be handled.
        """
        if self._signal is not None:
            return True
        room, now = self._room(), time.monotonic()
        ready: list[_QueuedTask[Task]] = []
        while self._retries and self._retries[0][0] <= now:
            ready.append(heapq.heappop(self._retries)[2])
        # Tasks that wait for a retry take no room, or a worker would wait with them; but once they are as many as
        # there is room for, no new task is taken, or an outage would consume the whole stream.
        if len(self._retries) < room and not self.is_paused:
            new_tasks = itertools.islice(waiting, max(0, room + num_done - len(self._in_flight) - len(ready)))
            ready += [_QueuedTask(task=task, name=self._name(task)) for task in new_tasks]
        self._submit([entry for entry in ready if not entry.avoid])
        for entry in ready:
            if entry.avoid:
                self._submit([entry], workers=self._health.others(entry.avoid))
        return bool(self._in_flight or self._retries)

    def _room(self) -> int:
        """Number of tasks that may be in flight; without workers that of one, so that the first one finds work."""
        now = time.monotonic()
        if now - self._num_workers_at > _POLL_SECONDS:
            self._workers.replenish()
            self._num_workers, self._num_workers_at = max(1, len(self._workers.addresses())), now
        ahead = 1 + math.ceil(_SECONDS_AHEAD / max(self._mean_seconds, 1e-3))
        return self._num_workers * min(max(_PER_WORKER, ahead), _MOST_PER_WORKER)

    def _submit(self, entries: Sequence[_QueuedTask[Task]], *, workers: Sequence[str] = ()) -> None:
        """Submit tasks in one message; the given `workers` are preferred to others."""
        if not entries:
            return
        requests, keys = [], []
        for entry in entries:
            entry.submission = next(self._submissions)
            requests.append((self._workers.client_id, self._function, self._dumps(entry.task)))
            keys.append(f"{entry.name}-{entry.submission}-{self._workers.client_id}")
        choice = {"workers": list(workers), "allow_other_workers": True} if workers else {}
        futures = self._client.map(run_task, requests, key=keys, pure=False, resources={"teacher": 1}, **choice)
        for entry, key, future in zip(entries, keys, futures, strict=True):
            entry.future = future
            self._in_flight[key] = entry
            future.add_done_callback(lambda done: self._done_keys.put(done.key))

    def _wait_for_done(self) -> list[str]:
        """Keys of tasks that are done; waits for at least one, until a retry is due or the cluster needs a look."""
        if not self._in_flight and not self._retries:
            return []
        until_retry = self._retries[0][0] - time.monotonic() if self._retries else math.inf
        try:
            done = [self._done_keys.get(timeout=max(0.0, min(until_retry, _POLL_SECONDS)))]
        except queue.Empty:
            self._fail_without_workers()
            return []
        done += self._drain_done_keys()
        # Workers have enough to do meanwhile, and a message about several tasks costs little more than about one.
        end = self._handled_at + _SECONDS_TOGETHER
        while None not in done and 2 * len(done) < len(self._in_flight) and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                done.append(self._done_keys.get(timeout=left))
        return [key for key in done if key is not None and key in self._in_flight]

    def _drain_done_keys(self) -> Iterator[str | None]:
        while True:
            try:
                yield self._done_keys.get_nowait()
            except queue.Empty:
                return

    def _fail_without_workers(self) -> None:
        now = time.monotonic()
        if self._workers.addresses():
            self._no_workers_since = None
        elif self._no_workers_since is None:
            self._no_workers_since = now
        elif now - self._no_workers_since >= _SECONDS_WITHOUT_WORKERS:
            raise TryAgain("the cluster has had no worker with the resource `teacher=1` for five minutes")

    def _handle_results(self, done: list[str]) -> None:
        """Hand on results; retry or set aside tasks that failed."""
        self._handled_at = time.monotonic()
        errors: dict[str, BaseException] = {}
        for key, outcome in self._read_outcomes(done).items():
            if isinstance(outcome, BaseException):
                errors[key] = outcome
                continue
            entry = self._in_flight.pop(key)
            result, worker, seconds = outcome
            self._mean_seconds = seconds if self._mean_seconds == math.inf else 0.8 * self._mean_seconds + 0.2 * seconds
            self._finished += self._signal is not None
            self._health.succeeded(worker)
            self._on_result(entry.task, result, Execution(worker=worker, seconds=seconds, attempt=entry.attempt))
        if any(lost_worker(error) for error in errors.values()):
            time.sleep(_SECONDS_OF_A_LOSS)
            others = [key for key in self._drain_done_keys() if key in self._in_flight and key not in errors]
            errors |= {key: e for key, e in self._read_outcomes(others).items() if isinstance(e, BaseException)}
            for key in set(others) - set(errors):
                self._done_keys.put(key)
        self._handle_errors(errors)

    def _read_outcomes(self, keys: Iterable[str]) -> dict[str, Any]:
        """The outcome of each task: an error, or its result with worker and seconds. Raises TryAgain.

        A task whose result was lost with its worker before it was fetched has no outcome and is submitted again.
        """
        futures = {key: self._in_flight[key].future for key in keys}
        if any(future.status == "cancelled" for future in futures.values()):
            raise lost_scheduler()
        outcomes: dict[str, Any] = {key: f.exception() for key, f in futures.items() if f.status == "error"}
        there = {key: future for key, future in futures.items() if future.status == "finished"}
        outcomes |= self._fetch(there)
        self._resubmit([key for key in futures if key not in outcomes])
        return outcomes

    def _fetch(self, futures: dict[str, Any]) -> dict[str, Any]:
        """Results, or errors, of finished tasks, without results that were lost with their workers.

        Dask waits for a lost result until the task was executed again. That may take long, and nothing else would be
        handled or submitted meanwhile, so there is a time limit.
        """
        try:
            return self._gather(futures, _SECONDS_TO_FETCH) if futures else {}
        except TimeoutError:
            found: dict[str, Any] = {}
            for key, future in futures.items():
                with contextlib.suppress(TimeoutError):
                    found |= self._gather({key: future}, _SECONDS_TO_FETCH_SINGLE)
            return found

    def _gather(self, futures: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Results, or errors, within a time limit. Raises TimeoutError, and TryAgain when the scheduler is lost."""

        async def gather() -> dict[str, Any]:
            try:
                found: dict[str, Any] = await self._client.gather(futures, errors="skip", asynchronous=True)
            except asyncio.CancelledError as error:
                # Dask also raises this when a connection to a worker breaks during the call.
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

    def _resubmit(self, keys: Iterable[str]) -> None:
        """Submit tasks again that have not failed; after a signal they are dropped."""
        entries = [self._in_flight.pop(key) for key in keys]
        for entry in entries:
            entry.future.release()
        if self._signal is None:
            self._submit(entries)
        else:
            self._dropped += len(entries)

    def _handle_errors(self, errors: dict[str, BaseException]) -> None:
        """Retry or set aside failed tasks. Of a lost worker's tasks only the first, which it executed, has failed."""
        blamed: set[str] = set()
        for key, error in sorted(errors.items(), key=lambda item: self._in_flight[item[0]].submission):
            entry = self._in_flight.pop(key)
            worker = lost_worker(error)
            if self._signal is not None:
                self._dropped += 1
            elif worker is not None and (worker in blamed or self._health.was_ended(worker)):
                self._retry_later(entry, 0.0)
            else:
                self._handle_failure(entry, error)
            blamed |= {worker} if worker else set()
            entry.future.release()

    def _handle_failure(self, entry: _QueuedTask[Task], error: BaseException) -> None:
        action, lost = failure_action(error), lost_worker(error)
        if action == "fail":
            raise error
        what = f"its worker {lost} was lost" if lost else f"{error}"
        reason = f"{type(error).__name__}: {what} (attempt {entry.attempt})"
        is_blamed = not isinstance(error, EngineNotOpened)
        if action == "set_aside" or (is_blamed and entry.attempt >= self._settings.max_attempts):
            self.failures[entry.name] = reason
            self._on_set_aside(entry.task, entry.attempt, reason)
            return
        self._on_retry(entry.task, entry.attempt, reason)
        # A worker that survived the error has added its address to it as a note.
        worker = lost or next(iter(getattr(error, "__notes__", ())[-1:]), None)
        entry.avoid |= {worker} if worker else set()
        if action == "blame_worker" and worker:
            entry.avoid.add(self._health.name(worker))
            self._health.failed(worker, str(getattr(error, "problem", error)))
        delay = retry_delay_seconds(entry.name, entry.attempt, base=self._settings.retry_seconds)
        entry.attempt += is_blamed
        self._retry_later(entry, delay)

    def _retry_later(self, entry: _QueuedTask[Task], seconds: float) -> None:
        heapq.heappush(self._retries, (time.monotonic() + seconds, entry.submission, entry))

    def _drain(self, name: str) -> None:
        """Wait `grace_seconds` for the tasks that workers have started, and cancel the others. Raises Stopped."""
        grace = self._settings.grace_seconds
        deadline = time.monotonic() + grace
        started = self._started_keys()
        self._client.cancel([self._in_flight.pop(key).future for key in set(self._in_flight) - started])
        if self._in_flight:
            waiting = f"waiting up to {grace:g} s for {len(self._in_flight)} task(s) to finish"
            self._workers.say(f"{name}: {waiting}; a second signal ends the run at once")
        while self._in_flight and (seconds_left := deadline - time.monotonic()) > 0:
            try:
                done = self._done_keys.get(timeout=min(seconds_left, _POLL_SECONDS))
            except queue.Empty:
                self._fail_without_workers()
                continue
            self._handle_results([done] if done in self._in_flight else [])
        self._dropped += len(self._in_flight)
        raise Stopped(signal=name, finished=self._finished, dropped=self._dropped)

    def _started_keys(self) -> set[str]:
        """Keys of tasks that a worker has started; all in flight where the workers do not answer in time."""
        try:
            stacks = self._client.sync(self._client.scheduler.call_stack, keys=None, callback_timeout=_POLL_SECONDS)
        except (OSError, TimeoutError):
            return set(self._in_flight)
        return set(self._in_flight) & {key for keys in stacks.values() for key in keys}


def lost_scheduler() -> TryAgain:
    """The error for a lost connection to the scheduler."""
    return TryAgain("the connection to the Dask scheduler is lost; what is committed is kept, run the job again")
