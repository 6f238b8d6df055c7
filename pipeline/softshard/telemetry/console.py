"""The console: progress bars on a terminal, plain lines elsewhere.

Everything is written to stderr, so that stdout holds only results.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from softshard.telemetry.reporter import EventValue, Progress

if TYPE_CHECKING:
    from rich.table import Column

__all__ = ["ConsoleReporter"]

_SECONDS_BETWEEN_LINES = 10.0
_NARROW = 100
"""Columns; a narrower terminal shows no bar, so that there is room for the text."""
_WIDTH_OF_BAR = 16
_WIDTH_OF_TIMES = 20
"""Columns of the elapsed time, the time to go and the gaps, which a longer text must not push off the line."""


class ConsoleReporter:
    """Progress bars if stderr is a terminal, else a line at the start, every ten seconds and at the end."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def say(self, message: str) -> None:
        """Write a line to stderr; a closed pipe does not stop the work."""
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Show the progress of one operation."""
        with self._bar(label, total, unit) if self._terminal else self._lines(label, total, unit) as progress:
            yield progress

    def event(self, name: str, /, **values: EventValue) -> None:
        """The console shows no events."""

    @contextmanager
    def _bar(self, label: str, total: float | None, unit: str) -> Iterator[Progress]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        console = Console(stderr=True)
        text_width = console.width - _WIDTH_OF_TIMES
        columns = [
            TextColumn("{task.description}", table_column=_text_column(2 * text_width // 5)),
            BarColumn(bar_width=_WIDTH_OF_BAR),
            TextColumn("{task.fields[state]}", table_column=_text_column(3 * text_width // 5)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        ]
        if console.width < _NARROW:
            del columns[1]
        with Bars(*columns, console=console) as bars:
            task = bars.add_task(label, total=total, state="")

            def update(done: float, *, note: str = "", total: float | None = total) -> None:
                bars.update(task, completed=done, total=total, state=_state(done, total, unit, note))

            yield update

    @contextmanager
    def _lines(self, label: str, total: float | None, unit: str) -> Iterator[Progress]:
        started = last = time.monotonic()
        state = _state(0, total, unit, "")
        self.say(f"{label}: {state}")

        def update(done: float, *, note: str = "", total: float | None = total) -> None:
            nonlocal last, state
            state = _state(done, total, unit, note)
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                self.say(f"{label}: {state}")

        yield update
        self.say(f"{label}: {state}, done in {time.monotonic() - started:.1f} s")


def _text_column(width: int) -> Column:
    from rich.table import Column

    return Column(no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)


def _state(done: float, total: float | None, unit: str, note: str) -> str:
    if unit == "%":
        amount = f"{done:.0f}%"
    else:
        amount = f"{done:,.0f}/{total:,.0f} {unit}" if total is not None else f"{done:,.0f} {unit}"
    return f"{amount}, {note}" if note else amount
