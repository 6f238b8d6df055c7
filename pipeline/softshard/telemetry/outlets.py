"""Where a command's messages and events go: what the command line and the environment ask for, as one reporter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from softshard.telemetry.console import ConsoleReporter
from softshard.telemetry.log import STDERR, JsonLog
from softshard.telemetry.metrics import MetricsReporter
from softshard.telemetry.reporter import FanOut, Reporter, SilentReporter

__all__ = ["Outlets", "add_metrics", "open_reporter", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """What was asked for; None: not asked for."""

    quiet: bool = False
    """No lines and bars for people."""
    log: str | None = None
    """File of the log; `-`: stderr, in place of what is for people."""
    metrics_file: str | None = None
    push_gateway: str | None = None


def open_reporter(outlets: Outlets, *, run: str) -> FanOut:
    """Console and log. Raises JobInvalid when the log cannot be opened."""
    console: Reporter = SilentReporter() if outlets.quiet or outlets.log == STDERR else ConsoleReporter()
    reporter = FanOut(console)
    if outlets.log is not None:
        reporter.add(JsonLog(outlets.log, run=run, on_failure=console.say))
    return reporter


def add_metrics(reporter: FanOut, outlets: Outlets) -> None:
    """Metrics beside them, if they were asked for. Raises ExtraMissing, JobInvalid."""
    file, gateway = outlets.metrics_file, outlets.push_gateway
    if file is not None or gateway is not None:
        reporter.add(MetricsReporter(file=file, gateway=gateway, on_failure=partial(warn, reporter)))


def warn(reporter: Reporter, message: str) -> None:
    """Tell people and the log that an outlet does not work."""
    reporter.say(message)
    reporter.event("outlet_failed", message=message)
