"""A Dask cluster to run tasks on: a local one of processes by default, one that is running by address or by file.

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
_MOST_OUT_OF_ORDER = 32
_SECONDS_TO_CONNECT = 20
_SECONDS_FOR_THE_FILE = 60.0
_ATTEMPTS_TO_START = 3
_ENDED = {"closing", "closed", "failed"}
_LOGGED_MESSAGES = 100
"""Each end of each connection keeps its last messages, and with them the tasks in them: by Dask's own measure a
thousand, which is up to 25 MB a worker on the scheduler."""
_SECONDS_OF_WORK = 0.05
"""Dask adds workers while each has more work than this before it. It sees what is in flight, a fraction of what there
is to do, so that its own measure, five seconds, would leave a job of short parts with one worker."""
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": 1,
    "TOKENIZERS_PARALLELISM": "false",
    # Dask has workers give freed memory back at once. A training step frees and takes gigabytes, so with that it
    # spends a third of its time in page faults (measured: 282 tokens a CPU-second against 465 with these).
    "MALLOC_TRIM_THRESHOLD_": 2**32,
    "MALLOC_MMAP_THRESHOLD_": 2**30,
}


class Cluster:
    """A connection to a Dask cluster whose workers have the resource `teacher`."""

    def __init__(self, client: Any, settings: ClusterSettings, reporter: Reporter | None = None) -> None:
        self.client = client
        self.settings = settings
        # Two jobs may share a scheduler, and Dask takes tasks of one key for one task.
        self.run_id = uuid.uuid4().hex
        self._reporter = reporter or SilentReporter()

    def say(self, message: str) -> None:
        """One line for a person."""
        self._reporter.say(message)

    def on_message(self, handle: Callable[[Any], None]) -> None:
        """Pass on what tasks say with `send_message`, until another handler takes over."""
        self._handle = handle
        with contextlib.suppress(ValueError):
            self.client.unsubscribe_topic(TOPIC)
        self.client.subscribe_topic(TOPIC, self._hear)

    def _hear(self, event: tuple[float, Any]) -> None:
        run, message = event[1]
        if run == self.run_id:
            self._handle(message)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        name: Callable[[Task], str],
        on_result: Callable[[Task, Result, Execution], None],
        on_retry: Callable[[Task, int, str], None] = ignore_failure,
        on_set_aside: Callable[[Task, int, str], None] = ignore_failure,
    ) -> dict[str, str]:
        """Run a function over tasks; the names and reasons of those that were set aside.

        The function is sent to a worker as it is, so what all tasks share belongs into it, by `functools.partial`. Two
        tasks a worker are in flight, a few more where they take less than a tenth of a second, so memory does not grow
        with their number; workers that come later get their share. A task that fails for a reason that may pass (a lost
        worker, an input or output error, lack of memory) is tried again after a pause, on another worker where there is
        one, up to `cluster.max_attempts` times; one whose data is wrong is set aside at once. On SIGTERM or SIGINT
        nothing more is started, and what has been begun may finish within `cluster.grace_seconds`.

        Args:
            function: runs on a worker.
            tasks: are taken as there is room for them.
            name: of a task, for its key and for messages.
            on_result: is given the task, its result and how it came to it.
            on_retry: is given a task that is tried again, the number of the attempt that failed, and why it did.
            on_set_aside: the same, of a task that is not tried again.

        Raises:
            StorageFull: a worker's disk is full; nothing more is started.
            Stopped: a signal ended the run.
            TryAgain: the scheduler is lost, or no worker has come for five minutes.
            Exception: a bug in the function.
        """
        flight = TaskQueue(self, function, name=name, on_result=on_result, on_retry=on_retry, on_set_aside=on_set_aside)
        return flight.run(tasks)

    def in_order(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, name: str, out: str
    ) -> Iterator[Result]:
        """Results of a function over tasks in the order of the tasks, a bounded number of which are taken ahead.

        Args:
            function: runs on a worker; see `run`.
            tasks: are taken as there is room for them.
            name: of all tasks, to which their number is added.
            out: what they are for, named in the error.

        Raises:
            PartsFailed: a task was set aside.
            Exception: as `run` does.
        """
        done: dict[int, Result] = {}
        flight: TaskQueue[tuple[int, Task], Result] = TaskQueue(
            self,
            partial(_second, function),
            name=lambda numbered: f"{name}-{numbered[0]}",
            on_result=lambda numbered, result, _: done.update({numbered[0]: result}),
            on_retry=ignore_failure,
            on_set_aside=ignore_failure,
        )
        wanted = 0
        for _ in flight.rounds(enumerate(tasks)):
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1
            if flight.failures:
                raise PartsFailed(failures=flight.failures, out=out)
            flight.is_paused = len(done) >= _MOST_OUT_OF_ORDER

    def replenish(self) -> None:
        """Start workers of a local cluster anew that have ended for good.

        Dask starts a worker again that ends. But fifteen seconds after each loss it gives up one that is not there at
        that moment, be it that a later loss is not yet made good; with the last one a run would wait without end.
        """
        local = self.client.cluster
        if local is None:
            return
        for name, nanny in list(local.workers.items()):
            if nanny.status.name in _ENDED:
                local.workers.pop(name, None)
        # The number stays as it is, and what is missing of it is started.
        local.scale(len(local.worker_spec))

    def addresses(self) -> list[str]:
        """Workers that offer the resource; asks the scheduler. Raises TryAgain when it is lost."""
        if self.client.status != "running":
            raise lost_scheduler()
        try:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
        except OSError as error:
            raise lost_scheduler() from error
        return [address for address, worker in workers.items() if worker.get("resources", {}).get("teacher", 0) >= 1]


def _second(function: Callable[[Task], Result], numbered: tuple[int, Task]) -> Result:
    return function(numbered[1])


@contextmanager
def open_cluster(settings: ClusterSettings, reporter: Reporter | None = None) -> Iterator[Cluster]:
    """A local cluster, or a connection to a running one, as the settings say; its dashboard is named to the reporter.

    Raises:
        TryAgain: the scheduler does not answer, or its file does not come.
        JobInvalid: it speaks TLS, and no certificates are configured here.
    """
    import dask

    dask.config.set(
        {
            "distributed.admin.low-level-log-length": _LOGGED_MESSAGES,
            # Batches of texts are the largest tasks: some megabytes in one message, which is no mistake.
            "distributed.admin.large-graph-warning-threshold": "1 GiB",
        }
    )
    with ExitStack() as stack:
        if settings.scheduler is None and settings.scheduler_file is None:
            client = stack.enter_context(_local(settings))
        else:
            client = stack.enter_context(_connected(settings.scheduler or _address_in(str(settings.scheduler_file))))
        cluster = Cluster(client, settings, reporter)
        cluster.say(f"cluster: {_description(settings)}; dashboard: {_dashboard(client)}")
        yield cluster


def _description(settings: ClusterSettings) -> str:
    if settings.adaptive is not None:
        return f"{settings.adaptive.minimum} to {settings.adaptive.maximum} local workers"
    return settings.scheduler or settings.scheduler_file or f"{settings.workers} local worker(s)"


def _dashboard(client: Any) -> str:
    address = client.dashboard_link
    if client.cluster is not None and importlib.util.find_spec("bokeh") is None:
        return f"{address} (needs bokeh: install softshard[dashboard])"
    return str(address)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    from distributed import Client
    from distributed.security import Security

    if address.startswith("tls://") and Security().get_connection_args("client").get("ssl_context") is None:
        names = "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT and ...__CLIENT__KEY"
        raise JobInvalid(file=address, place="", problem=f"this scheduler wants certificates; set {names}")
    try:
        client = Client(address, timeout=f"{_SECONDS_TO_CONNECT}s", set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise TryAgain(f"{address}: no Dask scheduler answers here ({error})") from error
    with client:
        yield client


def _address_in(file: str) -> str:
    """Address in a scheduler's file, which may come later than the client and is not written at one stroke."""
    deadline = time.monotonic() + _SECONDS_FOR_THE_FILE
    while True:
        try:
            return str(json.loads(Path(file).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                problem = f"no Dask scheduler has left its address here for a minute ({type(error).__name__})"
                raise TryAgain(f"{file}: {problem}") from error
        time.sleep(0.2)


@contextmanager
def _local(settings: ClusterSettings) -> Iterator[Any]:
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
        _started(bounds.minimum if bounds else settings.workers, scratch) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        if bounds is not None:
            cluster.adapt(minimum=bounds.minimum, maximum=bounds.maximum, target_duration=_SECONDS_OF_WORK)
        yield client


def _started(num_workers: int, scratch: str) -> Any:
    """A local cluster of which all workers have come up; a worker that ends before that has it started anew."""
    from distributed import LocalCluster

    attempt = 1
    while True:
        try:
            return LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=True,
                resources={"teacher": 1},
                preload=["softshard.cluster.worker"],
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                local_directory=scratch,
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            # What Dask makes of a process that it has started and that is gone, or of one that it cannot start.
            if (full := full_disk(error, uri=scratch)) is not None:
                raise full from error
            if attempt == _ATTEMPTS_TO_START:
                problem = f"a worker ended {attempt} times before it had come up ({error})"
                raise TryAgain(f"local cluster of {num_workers}: {problem}; see what ends it") from error
            attempt += 1


OpenCluster = Callable[[], Cluster]
"""Starts the cluster when it is first called."""


@contextmanager
def lazy_cluster(settings: ClusterSettings, reporter: Reporter) -> Iterator[OpenCluster]:
    """A function that starts the cluster when it is first called; it ends with the context."""
    with ExitStack() as stack:
        started: list[Cluster] = []

        def get() -> Cluster:
            if not started:
                started.append(stack.enter_context(open_cluster(settings, reporter)))
            return started[0]

        yield get
