"""The parser of the command line, and the arguments that several commands share.

Values are checked here as far as possible without reading a job.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from softshard import __version__
from softshard.cli.command import Command

__all__ = [
    "add_job_arguments",
    "add_metrics_arguments",
    "add_out_argument",
    "add_progress_arguments",
    "make_parser",
    "positive_count",
    "positive_number",
]

_EXIT_CODES = "exit codes: 0 done, 1 a bug, 2 job or arguments, 3 bad data, 75 try again"


def make_parser(commands: Iterable[Command]) -> argparse.ArgumentParser:
    """The parser; the attribute `command` of the parsed arguments is the chosen `Command`."""
    description = "Turn a corpus of human writing into stored next-token distributions, and train models on them."
    parser = argparse.ArgumentParser(prog="softshard", description=description, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"softshard {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_EXIT_CODES,
        )
        subparser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the job, and the arguments on progress."""
    parser.add_argument("job", metavar="JOB.yaml", help="the job file, or the output folder of a job that has run")
    add_progress_arguments(parser)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    """Add the output folder."""
    parser.add_argument("out", metavar="OUT", help="output folder of a job, or its job file")


def add_progress_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides where progress and events are written."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--log",
        metavar="FILE",
        default=os.environ.get("SOFTSHARD_LOG") or None,
        help="append events to FILE as JSON lines; -: write them to stderr instead of progress (SOFTSHARD_LOG)",
    )


def add_metrics_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides where Prometheus metrics are written."""
    parser.add_argument(
        "--metrics-file",
        metavar="FILE.prom",
        default=os.environ.get("SOFTSHARD_METRICS_FILE") or None,
        help="write Prometheus metrics for node-exporter's textfile collector (SOFTSHARD_METRICS_FILE)",
    )
    parser.add_argument(
        "--push-gateway",
        metavar="URL",
        default=os.environ.get("SOFTSHARD_PUSHGATEWAY") or None,
        help="push the metrics to a Pushgateway (SOFTSHARD_PUSHGATEWAY)",
    )


def positive_number(text: str) -> float:
    """A type for argparse: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def positive_count(text: str) -> int:
    """A type for argparse: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
