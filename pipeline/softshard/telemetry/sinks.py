"""The sinks of a command's messages and events, as the command line and the environment request them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from softshard.telemetry.console import ConsoleReporter
from softshard.telemetry.log import STDERR, JsonLog
from softshard.telemetry.metrics import MetricsReporter
from softshard.telemetry.reporter import FanOut, Reporter, SilentReporter

__all__ = ["Sinks", "add_metrics", "open_reporter", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """Where to send messages, events and metrics; None means that a sink was not requested."""

    quiet: bool = False
    """Show no lines and progress bars."""
    log: str | None = None
    """File of the JSON log; `-` means stderr, in place of the lines for people."""
    metrics_file: str | None = None
    push_gateway: str | None = None

    @property
    def shows_lines(self) -> bool:
        """Whether lines for people go to stderr."""
        return not self.quiet and self.log != STDERR


def open_reporter(sinks: Sinks, *, run: str) -> FanOut:
    """A reporter for the console and the log. Raises JobInvalid if the log cannot be opened."""
    console: Reporter = ConsoleReporter() if sinks.shows_lines else SilentReporter()
    reporter = FanOut(console)
    if sinks.log is not None:
        reporter.add(JsonLog(sinks.log, run=run, on_failure=console.say))
    return reporter


def add_metrics(reporter: FanOut, sinks: Sinks) -> None:
    """Add metrics to the reporter if they were requested. Raises ExtraMissing, JobInvalid."""
    file, gateway = sinks.metrics_file, sinks.push_gateway
    if file is not None or gateway is not None:
        reporter.add(MetricsReporter(file=file, gateway=gateway, on_failure=partial(warn, reporter)))


def warn(reporter: Reporter, message: str) -> None:
    """Report to people and to the log that a sink does not work."""
    reporter.say(message)
    reporter.event("outlet_failed", message=message)
