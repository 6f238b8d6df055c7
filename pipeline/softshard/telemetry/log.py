"""The log for machines: one JSON object per line, with events, messages and, at intervals, progress.

Keys of a line: `time` (UTC, ISO 8601), `level` (info, warning, error), `event`, `run`, `job` and, where known, `stage`
and `part`; then the event's own values, flat. A failure to write the log never ends a run.

Where the log is on stderr, `json_stderr` makes lines of JSON of what libraries write there too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import TextIO

from softshard.errors import EXIT_TRY_AGAIN, JobInvalid
from softshard.telemetry.redaction import without_credentials
from softshard.telemetry.reporter import EventValue, Progress

__all__ = ["STDERR", "JsonLog", "json_stderr", "log_line"]

STDERR = "-"
"""The log path that means stderr, in place of the lines for people."""

_SECONDS_BETWEEN_LINES = 30.0
_LEVELS = {
    "part_retried": "warning",
    "worker_restarted": "warning",
    "worker_retired": "warning",
    "part_set_aside": "error",
    "outlet_failed": "warning",
}


def log_line(event: str, /, level: str = "info", **values: EventValue) -> str:
    """One line, without a newline; values that are None are left out."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    known = {key: value for key, value in values.items() if value is not None}
    return json.dumps({"time": now, "level": level, "event": event, **known}, ensure_ascii=False)


@contextmanager
def json_stderr() -> Iterator[None]:
    """Make every line that this process writes to stderr JSON: what is none becomes the event `library_message`.

    Libraries log and warn on stderr by handlers of their own, for one while a hub is away.
    """
    plain = sys.stderr
    wrapped = _JsonLines(plain)
    sys.stderr = wrapped
    try:
        yield
    finally:
        sys.stderr = plain
        with contextlib.suppress(BrokenPipeError):
            wrapped.end()


class _JsonLines(io.TextIOBase):
    """Passes lines of JSON on, and every other line as JSON."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._begun, self._lock = stream, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            # A progress bar goes back to the beginning of its line.
            *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
            for line in filter(str.strip, lines):
                self._stream.write(f"{_as_json(line)}\n")
        return len(text)

    def end(self) -> None:
        """Write what is begun as a line."""
        with self._lock:
            if self._begun.strip():
                self.write("\n")
            self.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


def _as_json(line: str) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(line), dict):
            return line
    return log_line("library_message", "warning", message=without_credentials(line.strip()))


class JsonLog:
    """Writes events, messages and, every thirty seconds, progress as JSON lines.

    The file is appended to, and reopened after it has been moved away, so that it can be rotated.

    Args:
        path: a file, or `-` for stderr.
        on_failure: called with a message the first time a line cannot be written.

    Raises:
        JobInvalid: the file cannot be opened.
    """

    def __init__(self, path: str, *, run: str, on_failure: Callable[[str], None]) -> None:
        self._context: dict[str, EventValue] = {"run": run, "job": None, "stage": None}
        self._handler = _open(path)
        self._failed = False

        def failed(record: logging.LogRecord) -> None:
            if not self._failed:
                self._failed = True
                on_failure(f"{path}: the log cannot be written ({sys.exc_info()[1]}); the run continues")

        self._handler.handleError = failed  # type: ignore[method-assign]

    def say(self, message: str) -> None:
        """Write a message for people as the event `message`."""
        self.event("message", message=message)

    @contextmanager
    def progress(self, label: str, *, total: float | None, unit: str) -> Iterator[Progress]:
        """Write progress as the event `progress`: at the start, every thirty seconds and at the end."""
        started = last = time.monotonic()
        now: dict[str, EventValue] = {"label": label, "unit": unit, "done": 0, "total": total, "note": None}
        self.event("progress", **now)

        def update(done: float, *, note: str = "", total: float | None = total) -> None:
            nonlocal last
            now.update(done=done, total=total, note=note or None)
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.event("progress", **now)

        yield update
        self.event("progress", **now, seconds=round(time.monotonic() - started, 3))

    def event(self, name: str, /, **values: EventValue) -> None:
        """Write one line; its stage is the last one started that has not finished."""
        if name == "run_started":
            self._context["job"] = values.get("job")
            values = {**values, "host": socket.gethostname(), "pid": os.getpid()}
        if name == "stage_started":
            self._context["stage"] = values.get("stage")
        level = _level(name, values)
        known = {key: value for key, value in values.items() if key != "level"}
        self._write(log_line(name, level, **{**self._context, **known}))
        if name == "stage_finished":
            self._context["stage"] = None

    def _write(self, line: str) -> None:
        self._handler.handle(logging.LogRecord("softshard", logging.INFO, "", 0, line, None, None))


def _level(name: str, values: dict[str, EventValue]) -> str:
    if name == "run_finished":
        code = values.get("exit_code")
        return "info" if code == 0 else "warning" if code == EXIT_TRY_AGAIN else "error"
    return str(values.get("level") or _LEVELS.get(name, "info"))


def _open(path: str) -> logging.Handler:
    if path == STDERR:
        return logging.StreamHandler(sys.stderr)
    try:
        return WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        problem = f"{path}: cannot be written ({error.strerror}); name a file in an existing folder, or - for stderr"
        raise JobInvalid(file="softshard", place="--log", problem=problem) from error
