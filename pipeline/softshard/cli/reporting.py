"""Where a command reports its progress and events, as its arguments ask for."""

from __future__ import annotations

import argparse
import uuid

from softshard.telemetry import FanOut
from softshard.telemetry.sinks import Sinks, open_reporter

__all__ = ["make_reporter", "make_sinks"]


def make_sinks(arguments: argparse.Namespace) -> Sinks:
    """The sinks that the arguments name; a command without metrics has none."""
    return Sinks(
        quiet=arguments.quiet,
        log=arguments.log,
        metrics_file=getattr(arguments, "metrics_file", None),
        push_gateway=getattr(arguments, "push_gateway", None),
    )


def make_reporter(arguments: argparse.Namespace) -> FanOut:
    """A reporter for a command that runs no stage. Raises JobInvalid when the log cannot be opened."""
    return open_reporter(make_sinks(arguments), run=str(uuid.uuid4()))
