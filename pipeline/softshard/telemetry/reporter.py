"""What the core tells while it works: messages for people, progress, and events for machines.

The core takes a `Reporter` and never prints. `FanOut` is the reporter that passes all of it on to several others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from softshard.telemetry.redaction import without_credentials

__all__ = ["EventValue", "FanOut", "Progress", "Reporter", "SilentReporter"]

EventValue = str | int | float | bool | None


class Progress(Protocol):
    """Progress of one piece of work."""

    def __call__(self, done: float, *, note: str = "", total: float | None = None) -> None:
        """`done` units are done now; `total`, where it was not known before, is known now."""


class Reporter(Protocol):
    """Where messages and progress go."""

    def say(self, message: str) -> None:
        """One line for a person."""

    def progress(self, label: str, *, total: float | None, unit: str) -> AbstractContextManager[Progress]:
        """Progress of one piece of work, from entering to leaving the context."""

    def event(self, name: str, /, **values: EventValue) -> None:
        """A fact for machines, such as that a part was committed; logs and metrics are made of them."""


class SilentReporter:
    """Says nothing; for tests and for use as a library."""

    def say(self, message: str) -> None:
        """Say nothing."""

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Show nothing."""

        def ignore(done: float, *, note: str = "", total: float | None = None) -> None:
            return None

        yield ignore

    def event(self, name: str, /, **values: EventValue) -> None:
        """Keep it to itself."""


class FanOut:
    """Passes everything on to several reporters, in their order, without the credentials that may stand in it."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = list(reporters)

    def add(self, reporter: Reporter) -> None:
        """One more, which hears what comes from now on."""
        self._reporters.append(reporter)

    def say(self, message: str) -> None:
        """Pass a line on."""
        for reporter in self._reporters:
            reporter.say(without_credentials(message))

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Pass progress on."""
        with ExitStack() as stack:
            shown = [
                stack.enter_context(reporter.progress(without_credentials(label), total=total, unit=unit))
                for reporter in self._reporters
            ]

            def update(done: float, *, note: str = "", total: float | None = total) -> None:
                for one in shown:
                    one(done, note=without_credentials(note), total=total)

            yield update

    def event(self, name: str, /, **values: EventValue) -> None:
        """Pass an event on."""
        plain = {key: without_credentials(value) if isinstance(value, str) else value for key, value in values.items()}
        for reporter in self._reporters:
            reporter.event(name, **plain)
