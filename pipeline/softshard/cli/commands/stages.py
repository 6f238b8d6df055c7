"""`softshard corpus`, `teacher`, `targets`, `train` and `evaluate`: one stage of a job."""

from __future__ import annotations

import argparse

from softshard.cli.arguments import add_job_arguments, add_metrics_arguments
from softshard.cli.command import Command
from softshard.cli.result import print_result

__all__ = ["COMMANDS"]

_HELP = {
    "corpus": "read, screen and tokenise the documents",
    "teacher": "adapt the teacher to the corpus, fold by fold",
    "targets": "score the corpus with the teacher and write the parts",
    "train": "train the adapter, and the baseline for comparison",
    "evaluate": "compare base, baseline and adapter, and write the report",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add_metrics_arguments(parser)


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.cli.commands.status import render_status
    from softshard.cli.job_run import run_named_job
    from softshard.cli.reporting import make_sinks
    from softshard.output.status import read_status

    outcome = run_named_job(arguments.job, stages=(arguments.command.name,), sinks=make_sinks(arguments))
    status = read_status(outcome.out)
    print_result(arguments, status, render_status(status))
    return 0


COMMANDS = tuple(
    Command(name=stage, help=help_text, add_arguments=_add_arguments, execute=_execute)
    for stage, help_text in _HELP.items()
)
