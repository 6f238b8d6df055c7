"""Prometheus metrics of a run: a file for node-exporter's textfile collector, and pushes to a gateway.

Counters belong to this run. Every metric has the label `job_name`, because Prometheus uses `job` itself. The file is
replaced whole. A failure to write the file or to push never ends a run.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from softshard.errors import EXIT_TRY_AGAIN, ExtraMissing, JobInvalid
from softshard.telemetry.redaction import without_credentials
from softshard.telemetry.reporter import EventValue, SilentReporter

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["MetricsReporter", "RunMetrics"]

_LAST_SUCCESS = "softshard_last_success_timestamp_seconds"
_LAST_SUCCESS_IS = "When a run of this job last ended with exit code 0."
_SECONDS_BETWEEN_WRITES = 15.0
_SECONDS_OF_RATE = 300.0
_SECONDS_OF_A_PUSH = 5.0
_COUNTERS = {
    "softshard_positions": "Positions of the parts that this run committed.",
    "softshard_sequences": "Sequences of the parts that this run committed.",
    "softshard_bytes": "Bytes of the parts that this run committed.",
}
_PART_STATES = {"part_committed": "committed", "part_retried": "retried", "part_set_aside": "set_aside"}


class RunMetrics:
    """The figures of a run, computed from its events; a collector for prometheus_client. Thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.job = ""
        self._run = ""
        self._counts = dict.fromkeys(_COUNTERS, 0.0)
        self._parts = dict.fromkeys(_PART_STATES.values(), 0)
        self._recent: deque[tuple[float, float]] = deque()
        self._since = clock()
        self._gauges: dict[str, tuple[str, float]] = {}
        self._stages: dict[str, float] = {}
        self._sources: dict[str, tuple[float, float]] = {}

    def take(self, name: str, values: dict[str, EventValue]) -> None:
        """Count an event."""
        with self._lock:
            if name == "run_started":
                self.job, self._run = str(values.get("job")), str(values.get("run"))
                self._set("softshard_run_start_timestamp_seconds", "When this run started.", self._clock())
            elif name == "stage_started":
                self._recent.clear()
                self._since = self._clock()
            elif name == "stage_finished":
                self._stages[str(values.get("stage"))] = _number(values.get("seconds"))
                self._recent.clear()
            elif name == "run_finished":
                self._finish(_number(values.get("exit_code")), _number(values.get("seconds")))
            elif name == "source_read":
                self._sources[str(values.get("source"))] = (
                    _number(values.get("documents")),
                    _number(values.get("left_out")),
                )
            elif name in _PART_STATES:
                self._parts[_PART_STATES[name]] += 1
            if name == "part_committed":
                for counter in _COUNTERS:
                    self._counts[counter] += _number(values.get(counter.removeprefix("softshard_")))
                self._recent.append((self._clock(), _number(values.get("positions"))))

    def succeeded_at(self, timestamp: float) -> None:
        """Set the time at which a run of the job last ended with exit code 0."""
        with self._lock:
            self._set(_LAST_SUCCESS, _LAST_SUCCESS_IS, timestamp)

    def _finish(self, exit_code: float, seconds: float) -> None:
        now = self._clock()
        self._recent.clear()
        self._set("softshard_run_duration_seconds", "How long the run took.", seconds)
        self._set("softshard_run_end_timestamp_seconds", "When the run ended.", now)
        self._set("softshard_run_exit_code", "What the run ended with; absent while it runs.", exit_code)
        if exit_code == 0:
            self._set(_LAST_SUCCESS, _LAST_SUCCESS_IS, now)

    def _set(self, name: str, text: str, value: float) -> None:
        self._gauges[name] = (text, value)

    def _rate(self) -> float:
        now = self._clock()
        while self._recent and self._recent[0][0] < now - _SECONDS_OF_RATE:
            self._recent.popleft()
        seconds = min(now - self._since, _SECONDS_OF_RATE)
        return sum(positions for _, positions in self._recent) / seconds if seconds > 0 else 0.0

    def collect(self) -> Iterable[Metric]:
        """All metrics with their current values."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        with self._lock:
            job = [self.job]
            about = {"run": self._run, "version": version("softshard")}
            info = InfoMetricFamily("softshard_run", "The run that these metrics are of.", labels=["job_name"])
            info.add_metric(job, about)
            yield info
            for name, text in _COUNTERS.items():
                counter = CounterMetricFamily(name, text, labels=["job_name"])
                counter.add_metric(job, self._counts[name])
                yield counter
            text = "Parts that this run committed, tried again, and set aside."
            parts = CounterMetricFamily("softshard_parts", text, labels=["job_name", "state"])
            for state, number in self._parts.items():
                parts.add_metric([*job, state], number)
            yield parts
            stages = GaugeMetricFamily(
                "softshard_stage_duration_seconds",
                "How long each finished stage took.",
                labels=["job_name", "stage"],
            )
            for stage, seconds in self._stages.items():
                stages.add_metric([*job, stage], seconds)
            yield stages
            yield from self._of_sources(job)
            rate = "Positions committed a second, over the last five minutes of this stage."
            for name, (text, value) in {
                "softshard_tokens_per_second": (rate, self._rate()),
                **self._gauges,
            }.items():
                gauge = GaugeMetricFamily(name, text, labels=["job_name"])
                gauge.add_metric(job, value)
                yield gauge

    def _of_sources(self, job: list[str]) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        texts = {
            "softshard_source_documents": "Documents that this run read from each source, kept or not.",
            "softshard_source_left_out_ratio": "Share of them that could not be decoded or had no text.",
        }
        for place, (name, text) in enumerate(texts.items()):
            gauge = GaugeMetricFamily(name, text, labels=["job_name", "source"])
            for source, values in self._sources.items():
                gauge.add_metric([*job, source], values[place])
            yield gauge


def _number(value: EventValue) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


class MetricsReporter(SilentReporter):
    """Writes a run's metrics when a stage starts or ends, when the run ends, and every fifteen seconds.

    A separate thread writes, so that a slow gateway does not delay the run. Messages and progress are ignored.

    Args:
        file: a file name that ends in `.prom`, or None.
        gateway: URI of a Pushgateway, or None; user and password in it are sent as basic authentication.
        on_failure: called with a message the first time the file or the gateway cannot be written to.

    Raises:
        ExtraMissing: prometheus_client is not installed.
        JobInvalid: the file cannot be written, or its name does not end in `.prom`.
    """

    def __init__(self, *, file: str | None, gateway: str | None, on_failure: Callable[[str], None]) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            what = "--metrics-file" if file else "--push-gateway"
            raise ExtraMissing(what=what, package="prometheus-client", extra="metrics") from error
        self._file = None if file is None else _check_file(file)
        self._gateway = gateway
        self._on_failure = on_failure
        self._failed: set[str] = set()
        self._metrics = RunMetrics()
        self._registry = CollectorRegistry()
        self._registry.register(self._metrics)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="softshard-metrics", daemon=True)

    def event(self, name: str, /, **values: EventValue) -> None:
        """Count an event. Writing starts with the first stage and ends with the run.

        A run that is refused because another one is using the output starts no stage and writes nothing, because file
        and gateway belong to the other run.
        """
        self._metrics.take(name, values)
        started = self._thread.ident is not None
        if name == "run_started":
            self._carry_over()
        elif name == "stage_started" and not started:
            self._thread.start()
        elif name in {"stage_started", "stage_finished"}:
            self._wake.set()
        elif name == "run_finished" and started:
            self._ended.set()
            self._wake.set()
            self._thread.join(2 * _SECONDS_OF_A_PUSH)
        elif name == "run_finished" and values.get("exit_code") != EXIT_TRY_AGAIN:
            self._write()

    def _carry_over(self) -> None:
        """Read the time of the last success from the file of an earlier run, so that a failed run keeps it."""
        from prometheus_client.parser import text_string_to_metric_families

        if self._file is None or not self._file.is_file():
            return
        try:
            samples = [
                sample
                for family in text_string_to_metric_families(self._file.read_text(encoding="utf-8"))
                for sample in family.samples
                if sample.name == _LAST_SUCCESS and sample.labels.get("job_name") == self._metrics.job
            ]
        except (OSError, ValueError):
            return  # an unreadable file is about to be replaced
        for sample in samples:
            self._metrics.succeeded_at(sample.value)

    def _keep_writing(self) -> None:
        while True:
            self._wake.clear()
            ended = self._ended.is_set()
            self._write()
            if ended:
                return
            self._wake.wait(_SECONDS_BETWEEN_WRITES)

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        if self._file is not None:
            with self._reported_once(str(self._file)):
                write_to_textfile(str(self._file), self._registry)
        if self._gateway is not None:
            with self._reported_once(self._gateway):
                self._push(self._gateway)

    def _push(self, gateway: str) -> None:
        from prometheus_client import pushadd_to_gateway
        from prometheus_client.exposition import basic_auth_handler, default_handler

        address = urlsplit(gateway if "://" in gateway else f"http://{gateway}")
        handler = default_handler
        if address.username is not None:
            user, password = unquote(address.username), unquote(address.password or "")
            handler = partial(basic_auth_handler, username=user, password=password)
            address = address._replace(netloc=address.netloc.rpartition("@")[2])
        pushadd_to_gateway(
            address.geturl(),
            job="softshard",
            registry=self._registry,
            grouping_key={"job_name": self._metrics.job},
            timeout=_SECONDS_OF_A_PUSH,
            handler=handler,
        )

    @contextmanager
    def _reported_once(self, where: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, http.client.HTTPException) as error:
            if where not in self._failed:
                self._failed.add(where)
                reason = f"the metrics cannot be written ({error}); the run continues"
                self._on_failure(without_credentials(f"{where}: {reason}"))


def _check_file(file: str) -> Path:
    path = Path(file)
    if path.suffix != ".prom":
        problem = f"{file}: must end in .prom, the ending that the textfile collector reads"
        raise JobInvalid(file="softshard", place="--metrics-file", problem=problem)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        problem = f"{file}: its folder does not exist or cannot be written to; name a file in another folder"
        raise JobInvalid(file="softshard", place="--metrics-file", problem=problem)
    return path
