"""The command line of every benchmark: options, tables, checked answers, and a record of the figures.

In: a function that measures. Out: readable lines while it runs; one JSON object as the last printed line; after a full
run a file in `benchmarks/results` with the machine, the commit and the command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softshard.errors import SoftshardError

__all__ = ["RESULTS", "Options", "Result", "WrongAnswer", "interleaved", "require", "run", "say", "say_table"]

_CACHE = Path(".cache/materials")
_ROOT = Path(__file__).parents[2]
RESULTS = _ROOT / "benchmarks" / "results"


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """Seconds of each candidate: the minimum over repeats, which alternate so that all see the same noise.

    `clock` defaults to wall-clock time.
    """
    now = clock or time.perf_counter
    seconds = dict.fromkeys(candidates, float("inf"))
    for _ in range(repeats):
        for name, candidate in candidates.items():
            started = now()
            candidate()
            seconds[name] = min(seconds[name], now() - started)
    return seconds


class WrongAnswer(Exception):
    """A benchmark's result differs from the same result computed another way, so its figures would mean nothing."""


def require(holds: bool, claim: str) -> None:
    """Print the claim that was checked. Raises WrongAnswer if it does not hold."""
    if not holds:
        raise WrongAnswer(claim)
    say(f"checked: {claim}")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def say_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of at most 80 characters: the first column aligned left, the others right."""
    cells = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        say("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    quick: bool
    """Less than a minute: fewer positions and repeats, and nothing is written to the results."""
    cache: Path
    device: str | None = None
    """Set if the benchmark offers a choice of devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark found."""

    figures: Mapping[str, float]
    """Named figures, printed as the last line."""
    details: Mapping[str, Any]
    """Tables and settings that the record has too."""


def run(name: str, measure: Callable[[Options], Result], *, devices: Sequence[str | None] = (None,)) -> int:
    """Parse the command line, measure, and print the figures as the last line. A full run is recorded.

    The help's first line is that of the docstring of `measure`'s module. `devices` are the choices of `--device`: the
    first is the default; runs on another one are rehearsals and never recorded.

    Returns:
        The exit code.
    """
    question = (sys.modules[measure.__module__].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="less than a minute, less exact, not recorded")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="folder of the material (default: %(default)s)")
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0], help="others are rehearsals, not recorded")
    options = Options(**vars(parser.parse_args()))
    commit, started = _commit(), time.monotonic()
    try:
        result = measure(options)
    except SoftshardError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    if not options.quick and options.device == devices[0]:
        _record(name, result, commit=commit, seconds=time.monotonic() - started)
    say(json.dumps(dict(result.figures)))
    return 0


def _record(name: str, result: Result, *, commit: str | None, seconds: float) -> None:
    content = {
        "command": f"python -m benchmarks.{name}",
        "commit": commit,
        "seconds": round(seconds),
        "machine": _machine(),
        "figures": dict(result.figures),
        "details": dict(result.details),
    }
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    say(f"recorded in benchmarks/results/{file.name}")


def _machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "numpy", "pyarrow")},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the working tree, with `-dirty` if it has changes outside the results; None without git."""
    described = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{described}-dirty" if described and changed else described


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
