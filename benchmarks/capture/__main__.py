"""The command line of this benchmark; `measure.py` says what it measures."""

from __future__ import annotations

from benchmarks.capture.measure import measure
from benchmarks.harness import run

__all__ = ["main"]


def main() -> int:
    """Run it. The exit code."""
    return run("capture", measure)


if __name__ == "__main__":
    raise SystemExit(main())
