"""Arguments of the command `softshard`: names, help and defaults of every subcommand.

In: the function of each subcommand. Out: a parser. What a value must be is checked here as far as it can be without
looking at a job.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from softshard import __version__

__all__ = ["STAGE_HELP", "make_parser"]

STAGE_HELP = {
    "corpus": "read, screen and tokenise the documents",
    "teacher": "adapt the teacher to the corpus, fold by fold",
    "targets": "score the corpus and write the parts",
    "train": "train the adapter, and the baseline beside it",
    "evaluate": "compare base, baseline and adapter, and write the report",
}
_EXIT_CODES = "exit codes: 0 done, 1 a bug, 2 job or arguments, 3 bad data, 75 try again"


@dataclass(frozen=True, slots=True)
class _Commands:
    subparsers: Any
    functions: Mapping[str, Callable[[argparse.Namespace], int]]

    def add(self, name: str, help_text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self.subparsers.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", epilog=_EXIT_CODES
        )
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(command=self.functions[name])
        return parser


def make_parser(functions: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the command; `command` of what it parses is the function of the subcommand's name."""
    description = "Turn a corpus of human writing into stored next-token distributions, and train models on them."
    parser = argparse.ArgumentParser(prog="softshard", description=description, epilog=_EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"softshard {__version__}")
    commands = _Commands(parser.add_subparsers(metavar="COMMAND", required=True), functions)

    run = commands.add("run", "do everything that the job asks for and that is not done yet")
    _add_job(run)
    _add_metrics(run)
    for stage, help_text in STAGE_HELP.items():
        command = commands.add(stage, help_text)
        _add_job(command)
        _add_metrics(command)

    plan = commands.add("plan", "say what a job would do, before anything runs")
    _add_job(plan)
    plan.add_argument(
        "--tokens-per-second", type=_positive, metavar="N", help="speed of one worker; else it is measured"
    )
    plan.add_argument("--price-per-hour", type=_positive, metavar="P", help="price of one worker's hour")
    plan.add_argument(
        "--pilot",
        type=_pilot_size,
        metavar="N",
        help="measure on N sequences, 2 or more, what each kind of target costs and keeps",
    )

    status = commands.add("status", "say how far an output folder is")
    _add_out(status)
    status.add_argument("--watch", action="store_true", help="say it again and again until the targets are complete")
    status.add_argument(
        "--every", type=_positive, default=5.0, metavar="SECONDS", help="with --watch: how often to look (5)"
    )

    _add_integrity(commands)

    show = commands.add("show", "show one stored sequence, position by position")
    _add_out(show)
    show.add_argument("--sequence", required=True, metavar="ID", help="id of the sequence, or its beginning")

    blend = commands.add("blend", "say what the targets of several outputs make together")
    blend.add_argument("outs", metavar="OUT", nargs="+", help="output folders of jobs")
    blend.add_argument(
        "--weights", type=_positive, nargs="+", metavar="W", help="a weight for each output (default: all the same)"
    )

    export = commands.add("export", "merge the adapter into its base and write a plain model folder")
    _add_out(export)
    export.add_argument("--to", required=True, metavar="FOLDER", help="a new or empty folder for the model")
    export.add_argument(
        "--dtype", choices=("base", "float32"), default="base", help="type of the weights: the base's (base) or float32"
    )

    schema = commands.add("schema", "print, write or check the published schemas")
    schema.add_argument("name", nargs="?", help="job, manifest, report, part or reference; without it, a list")
    schema.add_argument("--write", metavar="DIR", help="write all schemas into a folder")
    schema.add_argument("--check", metavar="DIR", nargs="?", const="schemas", help="compare with a folder (schemas)")
    return parser


def _add_integrity(commands: _Commands) -> None:
    """The commands that look for damage and leftovers, and mend."""
    verify = commands.add("verify", "read corpus, adapters and parts again and check them")
    _add_out(verify)
    _add_quiet(verify)
    verify.add_argument("--deep", action="store_true", help="decode every sketch and check its mass")
    verify.add_argument(
        "--against-teacher", type=_count, metavar="N", help="then score N sequences again and compare them with it"
    )
    verify.add_argument(
        "--engine", choices=("transformers", "vllm"), help="with --against-teacher: score with this engine"
    )

    repair = commands.add("repair", "make again exactly what is bad or missing")
    _add_out(repair)
    _add_quiet(repair)
    repair.add_argument("--deep", action="store_true", help="decode every sketch to find what is bad")

    garbage = commands.add("gc", "list, and with --yes remove, what no manifest names")
    _add_out(garbage)
    garbage.add_argument("--yes", action="store_true", help="remove what is listed")
    garbage.add_argument("--older", action="store_true", help="older manifests too, and what they alone name")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB.yaml", help="the job file")
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--log",
        metavar="FILE",
        default=os.environ.get("SOFTSHARD_LOG") or None,
        help="append JSON lines to a file; -: to stderr, in place of progress (SOFTSHARD_LOG)",
    )


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics-file",
        metavar="FILE.prom",
        default=os.environ.get("SOFTSHARD_METRICS_FILE") or None,
        help="Prometheus metrics, for node-exporter's textfile collector (SOFTSHARD_METRICS_FILE)",
    )
    parser.add_argument(
        "--push-gateway",
        metavar="URL",
        default=os.environ.get("SOFTSHARD_PUSHGATEWAY") or None,
        help="push the metrics to a Pushgateway (SOFTSHARD_PUSHGATEWAY)",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="output folder of a job")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _pilot_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of sequences; a pilot needs 2 or more")
    return int(text)
