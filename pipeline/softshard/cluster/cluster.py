"""A Dask cluster that executes tasks: by default local processes, or a running cluster by address or scheduler file.

`dask.distributed` is the only scheduler. Workers need the resource `teacher=1`; those of the local cluster have it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from softshard.cluster.task_queue import Execution, TaskQueue, ignore_failure, lost_scheduler
from softshard.cluster.worker import TOPIC
from softshard.config import ClusterSettings
from softshard.errors import JobInvalid, PartsFailed, TryAgain, full_disk
from softshard.telemetry import Reporter, SilentReporter

__all__ = ["WORKER_ENVIRONMENT", "Cluster", "OpenCluster", "lazy_cluster", "open_cluster"]

Task = TypeVar("Task")
Result = TypeVar("Result")
_MAX_RESULTS_AHEAD = 32
_SECONDS_TO_CONNECT = 20
_SECONDS_FOR_THE_FILE = 60.0
_ATTEMPTS_TO_START = 3
_SECONDS_TO_END = 15.0
_ENDED = {"closing", "closed", "failed"}
_LOGGED_MESSAGES = 100
"""Each end of each connection keeps its last messages, with the tasks in them. Dask's default of a thousand is up to
25 MB per worker on the scheduler."""
_SECONDS_OF_WORK = 0.05
"""Dask adds workers while each has more work queued than this. It sees only the tasks in flight, a fraction of all, so
its default of five seconds would leave a job of short parts with one worker."""
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": 1,
    "TOKENIZERS_PARALLELISM": "false",
    # By default Dask makes workers return freed memory at once. A training step frees and allocates gigabytes and would
    # spend a third of its time in page faults (measured: 282 tokens per CPU-second, 465 with these values).
    "MALLOC_TRIM_THRESHOLD_": 2**32,
    "MALLOC_MMAP_THRESHOLD_": 2**30,
}


class Cluster:
    """A connection to a Dask cluster whose workers have the resource `teacher`."""

    def __init__(self, client: Any, settings: ClusterSettings, reporter: Reporter | None = None) -> None:
        self.client = client
        self.settings = settings
        # In the key of each task: two jobs may share a scheduler, and Dask executes tasks of equal keys once.
        self.client_id = uuid.uuid4().hex
        self._reporter = reporter or SilentReporter()

    def say(self, message: str) -> None:
        """Show one line to the user."""
        self._reporter.say(message)

    def warn(self, event: str, *, worker: str, reason: str, message: str) -> None:
        """Show a warning to the user, and report it to logs."""
        self._reporter.say(message)
        self._reporter.event(event, worker=worker, reason=reason)

    def on_message(self, handle: Callable[[Any], None]) -> None:
        """Pass messages that tasks send with `send_message` to a handler, which replaces the previous one."""
        self._handle = handle
        with contextlib.suppress(ValueError):
            self.client.unsubscribe_topic(TOPIC)
        self.client.subscribe_topic(TOPIC, self._receive)

    def _receive(self, event: tuple[float, Any]) -> None:
        client_id, message = event[1]
        if client_id == self.client_id:
            self._handle(message)

    def map_tasks(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        name: Callable[[Task], str],
        on_result: Callable[[Task, Result, Execution], None],
        on_retry: Callable[[Task, int, str], None] = ignore_failure,
        on_set_aside: Callable[[Task, int, str], None] = ignore_failure,
    ) -> dict[str, str]:
        """Execute a function over tasks; returns the names of tasks that were set aside, with the reasons.

        The function is pickled once, so bind what all tasks share to it with `functools.partial`. Two tasks per worker
        are in flight, and a few more where they take less than a tenth of a second, so memory does not grow with the
        number of tasks; workers that join later get their share. A task that fails for a temporary reason (a lost
        worker, an input or output error, lack of memory) is tried again after a delay, on another worker where there is
        one, up to `cluster.max_attempts` times. A worker that cannot open its engine, or whose device fails, is started
        anew, and retired if it keeps failing. A task whose data is wrong is set aside at once. On SIGTERM or SIGINT
        no task is started any more, and those that workers have started may finish within `cluster.grace_seconds`.

        Args:
            function: executed on a worker.
            tasks: read as there is room for them.
            name: gives a task's name, for its key and for messages.
            on_result: called with a task, its result and how it was executed.
            on_retry: called with a task that will be tried again, the number of the failed attempt, and the reason.
            on_set_aside: called likewise with a task that is set aside.

        Raises:
            StorageFull: a worker's disk is full; no task is started any more.
            Stopped: a signal ended the run.
            TryAgain: the scheduler is lost, there has been no worker for five minutes, or all keep failing.
            Exception: a bug in the function.
        """
        task_queue = TaskQueue(
            self, function, name=name, on_result=on_result, on_retry=on_retry, on_set_aside=on_set_aside
        )
        return task_queue.run(tasks)

    def map_in_order(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, name: str, out: str
    ) -> Iterator[Result]:
        """Execute a function over tasks and yield the results in the order of the tasks, holding a bounded number.

        Args:
            function: executed on a worker; see `map_tasks`.
            tasks: read as there is room for them.
            name: common to all tasks; each gets its number appended.
            out: the folder that the error names.

        Raises:
            PartsFailed: a task was set aside.
            Exception: as `map_tasks`.
        """
        done: dict[int, Result] = {}
        task_queue: TaskQueue[tuple[int, Task], Result] = TaskQueue(
            self,
            partial(_apply_to_numbered, function),
            name=lambda numbered: f"{name}-{numbered[0]}",
            on_result=lambda numbered, result, _: done.update({numbered[0]: result}),
            on_retry=ignore_failure,
            on_set_aside=ignore_failure,
        )
        next_number = 0
        for _ in task_queue.iterate(enumerate(tasks)):
            while next_number in done:
                yield done.pop(next_number)
                next_number += 1
            if task_queue.failures:
                raise PartsFailed(failures=task_queue.failures, out=out)
            task_queue.is_paused = len(done) >= _MAX_RESULTS_AHEAD

    def replenish(self) -> None:
        """Replace workers of a local cluster that Dask no longer restarts.

        Dask restarts a worker that ends. But fifteen seconds after each loss it removes a worker that is absent at that
        moment, even where a restart is under way; without the last worker a run would wait forever.
        """
        local = self.client.cluster
        if local is None:
            return
        for name, nanny in list(local.workers.items()):
            if nanny.status.name in _ENDED:
                local.workers.pop(name, None)
        # Scaling to the present number starts the missing ones.
        local.scale(len(local.worker_spec))

    def addresses(self) -> dict[str, str]:
        """Workers with the resource `teacher`, from the scheduler: by address, the nanny's address or their own.

        Raises TryAgain when the scheduler is lost.
        """
        if self.client.status != "running":
            raise lost_scheduler()
        try:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
        except OSError as error:
            raise lost_scheduler() from error
        return {
            address: worker["nanny"] or address
            for address, worker in workers.items()
            if worker.get("resources", {}).get("teacher", 0) >= 1
        }

    def restart(self, address: str) -> None:
        """Start the process of a worker with a nanny anew. Tasks that it holds go to other workers."""
        restart = partial(
            self.client.scheduler.restart_workers,
            workers=[address],
            timeout=_SECONDS_TO_END,
            wait_for_workers=False,
            on_error="return",
            stimulus_id=f"softshard-{self.client_id}",
        )
        with contextlib.suppress(OSError, TimeoutError):
            self.client.sync(restart, callback_timeout=2 * _SECONDS_TO_END)

    def retire(self, address: str) -> None:
        """Take a worker out of the cluster; a local cluster stays smaller by one."""
        local = self.client.cluster
        with contextlib.suppress(OSError, TimeoutError):
            if local is None:
                self.client.sync(
                    self.client.scheduler.retire_workers, workers=[address], callback_timeout=_SECONDS_TO_END
                )
                return
            adaptive = getattr(local, "_adaptive", None)
            if adaptive is not None:
                adaptive.maximum = max(1, adaptive.maximum - 1)
                adaptive.minimum = min(adaptive.minimum, adaptive.maximum)
            worker = self.client.scheduler_info(n_workers=-1)["workers"].get(address)
            if worker is not None:
                local.sync(local.scale_down, [worker["name"]])


def _apply_to_numbered(function: Callable[[Task], Result], numbered: tuple[int, Task]) -> Result:
    return function(numbered[1])


@contextmanager
def open_cluster(settings: ClusterSettings, reporter: Reporter | None = None) -> Iterator[Cluster]:
    """A local cluster, or a connection to a running one, as the settings say; reports the address of its dashboard.

    Raises:
        TryAgain: the scheduler does not answer, or its file does not appear.
        JobInvalid: the scheduler uses TLS, and no certificates are configured here.
    """
    import dask

    dask.config.set(
        {
            "distributed.admin.low-level-log-length": _LOGGED_MESSAGES,
            # The largest tasks are batches of texts, some megabytes per message, which is intended.
            "distributed.admin.large-graph-warning-threshold": "1 GiB",
        }
    )
    with ExitStack() as stack:
        if settings.is_local:
            client = stack.enter_context(_start_local(settings))
        else:
            client = stack.enter_context(_connect(settings.scheduler or _read_address(str(settings.scheduler_file))))
        cluster = Cluster(client, settings, reporter)
        cluster.say(f"cluster: {_description(settings)}{_dashboard(client)}")
        yield cluster


def _description(settings: ClusterSettings) -> str:
    if settings.adaptive is not None:
        return f"{settings.adaptive.minimum} to {settings.adaptive.maximum} local workers"
    return settings.scheduler or settings.scheduler_file or f"{settings.workers} local worker(s)"


def _dashboard(client: Any) -> str:
    """The address of the dashboard; nothing where a local scheduler has none, because the extra is not installed."""
    if client.cluster is not None and importlib.util.find_spec("bokeh") is None:
        return ""
    return f"; dashboard: {client.dashboard_link}"


@contextmanager
def _connect(address: str) -> Iterator[Any]:
    from distributed import Client
    from distributed.security import Security

    if address.startswith("tls://") and Security().get_connection_args("client").get("ssl_context") is None:
        names = "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT and ...__CLIENT__KEY"
        raise JobInvalid(file=address, place="", problem=f"this scheduler requires TLS certificates; set {names}")
    try:
        client = Client(address, timeout=f"{_SECONDS_TO_CONNECT}s", set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise TryAgain(f"{address}: no Dask scheduler answers here ({error})") from error
    with client:
        yield client


def _read_address(file: str) -> str:
    """The address in a scheduler's file, which may appear after the client starts and is not written atomically."""
    deadline = time.monotonic() + _SECONDS_FOR_THE_FILE
    while True:
        try:
            return str(json.loads(Path(file).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                problem = f"no Dask scheduler has written its address here within a minute ({type(error).__name__})"
                raise TryAgain(f"{file}: {problem}") from error
        time.sleep(0.2)


@contextmanager
def _start_local(settings: ClusterSettings) -> Iterator[Any]:
    import dask
    from distributed import Client

    dask.config.set(
        {
            "distributed.worker.daemon": False,
            "distributed.scheduler.allowed-failures": 0,
            "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
        }
    )
    bounds = settings.adaptive
    with (
        tempfile.TemporaryDirectory(prefix="softshard-") as scratch,
        _start_workers(bounds.minimum if bounds else settings.workers, scratch) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if bounds is not None:
            cluster.adapt(minimum=bounds.minimum, maximum=bounds.maximum, target_duration=_SECONDS_OF_WORK)
        yield client


def _start_workers(num_workers: int, scratch: str) -> Any:
    """A local cluster whose workers are all ready; it is started again when a worker ends before that."""
    from distributed import LocalCluster

    from softshard.cluster.nanny import PatientNanny

    attempt = 1
    while True:
        try:
            return LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                worker_class=PatientNanny,
                resources={"teacher": 1},
                preload=["softshard.cluster.worker"],
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                local_directory=scratch,
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            # Dask raises these when a worker process ends early or cannot be started.
            if (full := full_disk(error, uri=scratch)) is not None:
                raise full from error
            if attempt == _ATTEMPTS_TO_START:
                problem = f"a worker ended before it was ready, {attempt} times ({error})"
                raise TryAgain(f"local cluster of {num_workers}: {problem}; find out what ends it") from error
            attempt += 1


OpenCluster = Callable[[], Cluster]
"""Returns the cluster; the first call starts it."""


@contextmanager
def lazy_cluster(settings: ClusterSettings, reporter: Reporter) -> Iterator[OpenCluster]:
    """A function that returns the cluster; its first call starts it, and the end of the context closes it."""
    with ExitStack() as stack:
        started: list[Cluster] = []

        def get() -> Cluster:
            if not started:
                started.append(stack.enter_context(open_cluster(settings, reporter)))
            return started[0]

        yield get
