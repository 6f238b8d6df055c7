"""The command line of this benchmark; `measure.py` says what it measures."""

from __future__ import annotations

from benchmarks.harness import run
from benchmarks.ingest.measure import measure

__all__ = ["main"]


def main() -> int:
    """Run it. The exit code."""
    return run("ingest", measure)


if __name__ == "__main__":
    raise SystemExit(main())
