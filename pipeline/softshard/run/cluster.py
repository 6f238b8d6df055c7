"""Tasks on a Dask cluster: a bounded number in flight, what can pass tried again, what cannot set aside.

`dask.distributed` is the only scheduler: a local cluster of processes by default, a running one by address.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from softshard.config import ClusterSettings
from softshard.errors import DataInvalid, SoftshardError, StorageFull, TryAgain
from softshard.models import out_of_memory

__all__ = ["Cluster", "open_cluster", "send_message"]

Task = TypeVar("Task")
Result = TypeVar("Result")
_TOPIC = "softshard"
_IN_FLIGHT_PER_WORKER = 2
_PATIENCE = 5.0
_SECONDS_WITHOUT_WORKERS = 300.0
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": 1,
    # Dask has workers give freed memory back at once. A training step frees and takes gigabytes, so with that it
    # spends a third of its time in page faults (measured: 282 tokens a CPU-second against 465 with these).
    "MALLOC_TRIM_THRESHOLD_": 2**32,
    "MALLOC_MMAP_THRESHOLD_": 2**30,
}


class Cluster:
    """A connection to a Dask cluster whose workers have the resource `teacher`."""

    def __init__(self, client: Any, settings: ClusterSettings) -> None:
        self._client = client
        self._settings = settings
        # Two jobs may share a scheduler, and Dask takes tasks of one key for one task.
        self._run = uuid.uuid4().hex

    def on_message(self, handle: Callable[[Any], None]) -> None:
        """Pass on what tasks say with `send_message`, until another handler takes over."""
        self._handle = handle
        with contextlib.suppress(ValueError):
            self._client.unsubscribe_topic(_TOPIC)
        self._client.subscribe_topic(_TOPIC, self._hear)

    def _hear(self, event: tuple[float, Any]) -> None:
        run, message = event[1]
        if run == self._run:
            self._handle(message)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        name: Callable[[Task], str],
        on_result: Callable[[Task, Result], None],
    ) -> dict[str, str]:
        """Run a function over tasks; the names and reasons of those that were set aside.

        At most two tasks a worker are in flight, so memory does not grow with their number; workers that come later
        get their share. A task that fails for a reason that may pass (a lost worker, an input or output error, memory
        that ran out) is tried again, up to `cluster.max_attempts` times; one whose data is wrong is set aside at once.

        Raises:
            StorageFull: a worker's disk is full; nothing more is started.
            TryAgain: the scheduler is lost, or no worker has come for five minutes.
            Exception: a bug in the function.
        """
        waiting = iter(tasks)
        flying: dict[Any, _Attempt[Task]] = {}
        failures: dict[str, str] = {}

        def submit(attempt: _Attempt[Task]) -> None:
            key = f"{name(attempt.task)}-{attempt.number}-{self._run}"
            order = (self._run, function, attempt.task)
            future = self._client.submit(_call, order, pure=False, resources={"teacher": 1}, key=key)
            flying[future] = attempt

        while True:
            room = max(0, self._num_workers() * _IN_FLIGHT_PER_WORKER - len(flying))
            for task in itertools.islice(waiting, room):
                submit(_Attempt(task, 1))
            if not flying:
                return failures
            for future in self._finished(flying):
                attempt = flying.pop(future)
                error = future.exception()
                if error is None:
                    on_result(attempt.task, future.result())
                elif isinstance(error, StorageFull):
                    raise error
                elif _may_pass(error) and attempt.number < self._settings.max_attempts:
                    submit(_Attempt(attempt.task, attempt.number + 1))
                elif isinstance(error, DataInvalid) or _may_pass(error):
                    reason = f"{type(error).__name__}: {error} (attempt {attempt.number})"
                    failures[name(attempt.task)] = reason
                else:
                    raise error
                future.release()

    def _finished(self, flying: Collection[Any]) -> list[Any]:
        """Futures that are done; waits for one, but not for a scheduler or for workers that are gone."""
        from distributed import wait
        from distributed.client import FuturesCancelledError

        alone = 0.0
        while True:
            try:
                with self._client.as_current():
                    return list(wait(list(flying), timeout=_PATIENCE, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                self._refuse_if_lost()
            except FuturesCancelledError as error:
                raise _lost() from error
            alone = 0.0 if self._workers() else alone + _PATIENCE
            if alone >= _SECONDS_WITHOUT_WORKERS:
                raise TryAgain("the cluster has had no worker with the resource `teacher=1` for five minutes")

    def _refuse_if_lost(self) -> None:
        if self._client.status != "running":
            raise _lost()

    def _workers(self) -> int:
        """Workers that offer the resource; asks the scheduler."""
        self._refuse_if_lost()
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return sum(worker.get("resources", {}).get("teacher", 0) >= 1 for worker in workers)

    def _num_workers(self) -> int:
        """At least 1, so that something waits for the first worker; asked for every few seconds at most."""
        now = time.monotonic()
        if now - self._counted_at > _PATIENCE:
            self._counted, self._counted_at = max(1, self._workers()), now
        return self._counted

    _counted, _counted_at = 1, float("-inf")


def _lost() -> TryAgain:
    return TryAgain("the connection to the Dask scheduler is lost; what is committed is kept, run the job again")


def _call(order: tuple[str, Callable[[Any], Any], Any]) -> Any:
    """What a worker runs; messages of the task carry the run that it belongs to."""
    global _run_of_task
    _run_of_task, function, task = order
    return function(task)


class _Attempt(Generic[Task]):
    """A task, and how often it has been started."""

    def __init__(self, task: Task, number: int) -> None:
        self.task = task
        self.number = number


def _may_pass(error: BaseException) -> bool:
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    if isinstance(error, SoftshardError):
        return isinstance(error, TryAgain)
    return isinstance(error, OSError | KilledWorker | CommClosedError) or out_of_memory(error)


_run_of_task = ""


def send_message(message: Any) -> None:
    """From inside a task: tell the client something, at most a few times a second."""
    from distributed import get_worker

    get_worker().log_event(_TOPIC, (_run_of_task, message))


@contextmanager
def open_cluster(settings: ClusterSettings) -> Iterator[Cluster]:
    """A local cluster of `settings.workers` processes, or a connection to `settings.scheduler`.

    Raises:
        TryAgain: the scheduler does not answer.
    """
    import dask
    from distributed import Client, LocalCluster

    dask.config.set(
        {
            "distributed.worker.daemon": False,
            "distributed.scheduler.allowed-failures": 0,
            "distributed.nanny.pre-spawn-environ": _WORKER_ENVIRONMENT,
        }
    )
    if settings.scheduler is not None:
        try:
            client = Client(settings.scheduler, timeout="20s", set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise TryAgain(f"{settings.scheduler}: no Dask scheduler answers here ({error})") from error
        with client:
            yield Cluster(client, settings)
        return
    with (
        tempfile.TemporaryDirectory(prefix="softshard-") as scratch,
        LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=1,
            processes=True,
            resources={"teacher": 1},
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield Cluster(client, settings)
