"""Tasks on a Dask cluster: a bounded number in flight, what can pass tried again, what cannot set aside.

`dask.distributed` is the only scheduler: a local cluster of processes by default, a running one by address.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from softshard.config import ClusterSettings
from softshard.errors import DataInvalid, SoftshardError, StorageFull, TryAgain

__all__ = ["Cluster", "open_cluster", "send_message"]

Task = TypeVar("Task")
Result = TypeVar("Result")
_TOPIC = "softshard"
_IN_FLIGHT_PER_WORKER = 2
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

    def on_message(self, handle: Callable[[Any], None]) -> None:
        """Pass on what tasks say with `send_message`."""
        self._client.unsubscribe_topic(_TOPIC) if _TOPIC in self._client._event_handlers else None
        self._client.subscribe_topic(_TOPIC, lambda event: handle(event[1]))

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        name: Callable[[Task], str],
        on_result: Callable[[Task, Result], None],
    ) -> dict[str, str]:
        """Run a function over tasks; the names and reasons of those that were set aside.

        At most two tasks a worker are in flight, so memory does not grow with their number. A task that fails for a
        reason that may pass (a lost worker, an input or output error) is tried again, up to `cluster.max_attempts`
        times; one whose data is wrong is set aside at once.

        Raises:
            StorageFull: a worker's disk is full; nothing more is started.
            Exception: a bug in the function.
        """
        from distributed import as_completed

        workers = max(1, len(self._client.scheduler_info()["workers"]))
        waiting = iter(tasks)
        futures = as_completed(loop=self._client.loop)
        flying: dict[Any, _Attempt[Task]] = {}
        failures: dict[str, str] = {}

        def submit(attempt: _Attempt[Task]) -> None:
            future = self._client.submit(
                function,
                attempt.task,
                pure=False,
                resources={"teacher": 1},
                key=f"{name(attempt.task)}-{attempt.number}",
            )
            flying[future] = attempt
            futures.add(future)

        def refill() -> None:
            while len(flying) < workers * _IN_FLIGHT_PER_WORKER:
                task = next(waiting, None)
                if task is None:
                    return
                submit(_Attempt(task, 1))

        refill()
        while flying:
            future = next(futures)
            attempt = flying.pop(future)
            error = future.exception() if future.status != "cancelled" else TryAgain("the task was cancelled")
            if error is None:
                on_result(attempt.task, future.result())
            elif isinstance(error, StorageFull):
                raise error
            elif _may_pass(error) and attempt.number < self._settings.max_attempts:
                submit(_Attempt(attempt.task, attempt.number + 1))
            elif isinstance(error, DataInvalid) or _may_pass(error):
                failures[name(attempt.task)] = f"{type(error).__name__}: {error} (attempt {attempt.number})"
            else:
                raise error
            future.release()
            refill()
        return failures


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
    return isinstance(error, OSError | KilledWorker | CommClosedError | MemoryError)


def send_message(message: Any) -> None:
    """From inside a task: tell the client something, at most a few times a second."""
    from distributed import get_worker

    get_worker().log_event(_TOPIC, message)


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
