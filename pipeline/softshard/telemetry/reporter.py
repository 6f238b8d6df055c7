"""What the core reports while it works: messages for people, progress, and events for machines.

The core takes a `Reporter` and never prints. `FanOut` is a reporter that passes everything on to several others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from softshard.telemetry.redaction import without_credentials

__all__ = ["EventValue", "FanOut", "Progress", "Reporter", "SilentReporter"]

EventValue = str | int | float | bool | None


class Progress(Protocol):
    """Reports the progress of one operation."""

    def __call__(self, done: float, *, note: str = "", total: float | None = None) -> None:
        """Set the number of units done; `total` may be given once it becomes known."""


class Reporter(Protocol):
    """Receives messages, progress and events."""

    def say(self, message: str) -> None:
        """Report one line to people."""

    def progress(self, label: str, *, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        """Report the progress of one operation, from entering to leaving the context."""

    def event(self, name: str, /, **values: EventValue) -> None:
        """Report an event to machines, such as a committed part; logs and metrics are made from events."""


class SilentReporter:
    """Ignores everything: for tests and for use as a library, and the base of reporters that need only events."""

    def say(self, message: str) -> None:
        """Ignore a message."""

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Ignore progress."""
        yield _ignore_progress

    def event(self, name: str, /, **values: EventValue) -> None:
        """Ignore an event."""


def _ignore_progress(done: float, *, note: str = "", total: float | None = None) -> None:
    """A Progress that shows nothing."""


class FanOut:
    """Passes everything on to several reporters, in order, with credentials removed."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = list(reporters)

    def add(self, reporter: Reporter) -> None:
        """Add a reporter, which receives everything from now on."""
        self._reporters.append(reporter)

    def say(self, message: str) -> None:
        """Pass a message on."""
        for reporter in self._reporters:
            reporter.say(without_credentials(message))

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Pass progress on."""
        with ExitStack() as stack:
            updates = [
                stack.enter_context(reporter.progress(without_credentials(label), total=total, unit=unit))
                for reporter in self._reporters
            ]

            def update(done: float, *, note: str = "", total: float | None = total) -> None:
                for update_one in updates:
                    update_one(done, note=without_credentials(note), total=total)

            yield update

    def event(self, name: str, /, **values: EventValue) -> None:
        """Pass an event on."""
        plain = {key: without_credentials(value) if isinstance(value, str) else value for key, value in values.items()}
        for reporter in self._reporters:
            reporter.event(name, **plain)
