"""`softshard status --watch`: a display that is redrawn on a terminal, and one line per look elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from softshard.cli.terminal import WIDTH, printable
from softshard.errors import EXIT_TRY_AGAIN
from softshard.output.watch import LiveStatus, RunSeen, Watcher
from softshard.storage import open_store

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render_display", "render_line", "watch_output"]


def watch_output(out: str, *, every_seconds: float, as_json: bool, write: Callable[[str], None]) -> int:
    """Show an output until it is complete; returns the exit code: 0, or 75 when interrupted before.

    Args:
        write: called with each line where stdout is not a terminal, or with JSON.

    Raises:
        JobInvalid: there is no job in it.
        PartCorrupt: a receipt or a manifest cannot be read.
    """
    watcher = Watcher(open_store(out))
    try:
        if sys.stdout.isatty() and not as_json:
            return _redraw(out, watcher, every_seconds)
        for status in _look_until_complete(watcher, every_seconds):
            write((json.dumps(asdict(status)) if as_json else render_line(status)) + "\n")
    except KeyboardInterrupt:
        return EXIT_TRY_AGAIN
    return 0


def _look_until_complete(watcher: Watcher, every_seconds: float) -> Iterator[LiveStatus]:
    while True:
        started = time.monotonic()
        status = watcher.look()
        yield status
        if status.complete:
            return
        time.sleep(max(0.0, every_seconds - (time.monotonic() - started)))


def _redraw(out: str, watcher: Watcher, every_seconds: float) -> int:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(width=min(WIDTH, Console().width))
    with Live(Text(f"{printable(out)}: reading its receipts"), console=console, auto_refresh=False) as live:
        for status in _look_until_complete(watcher, every_seconds):
            live.update(render_display(status), refresh=True)
    return 0


def render_line(status: LiveStatus) -> str:
    """One look as one line."""
    words = [f"{_fraction(status.parts, status.parts_total)} parts{_share(status)}"]
    words.append(f"{_fraction(status.positions, status.positions_total)} positions")
    words += _speed(status)
    words.append("complete" if status.complete else _run(status))
    return printable(f"{status.time} {status.out}: {', '.join(words)}")


def render_display(status: LiveStatus) -> RenderableType:
    """One look as a display of at most 80 columns."""
    from rich.console import Group
    from rich.filesize import decimal
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2), expand=False)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    if status.parts_total is None:
        rows.add_row("corpus", "not complete")
    amount = f"{_fraction(status.parts, status.parts_total)} parts{_share(status)}"
    if status.parts_total:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=status.positions_total or 1, completed=status.positions, width=28), Text(amount))
        rows.add_row("targets", bar)
    else:
        rows.add_row("targets", Text(amount))
    sizes = [f"{_fraction(status.positions, status.positions_total)} positions", decimal(status.bytes)]
    if status.positions:
        sizes.append(f"{status.bytes / status.positions:.1f} bytes per position")
    rows.add_row("", Text(", ".join(sizes)))
    if speed := _speed(status):
        rows.add_row("", Text(", ".join(speed)))
    rows.add_row("run", Text(printable(_run(status))))
    for number, path in enumerate(reversed(status.last_parts)):
        rows.add_row("" if number else "last", Text(printable(path)))
    done = "complete" if status.complete else status.time
    return Group(Text(printable(f"{status.out}: job {status.job}, {done}")), rows)


def _fraction(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def _share(status: LiveStatus) -> str:
    return f" ({status.positions / status.positions_total:.1%})" if status.positions_total else ""


def _speed(status: LiveStatus) -> list[str]:
    if status.positions_per_second is None or status.targets_complete:
        return []
    words = [f"{status.positions_per_second:,.0f} positions per second"]
    if status.eta_seconds is not None:
        words.append(f"{timedelta(seconds=round(status.eta_seconds))} to go")
    return words


def _run(status: LiveStatus) -> str:
    run = status.run
    return _describe_run(run) if run is not None else "no run is active"


def _describe_run(run: RunSeen) -> str:
    state = "active" if run.is_alive else f"silent for {timedelta(seconds=round(run.silent_seconds))}"
    return f"{run.run} on {run.host}, process {run.pid}, {state}"
