"""`softshard status`: how far an output is, once or, with `--watch`, until its targets are complete."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument, positive_number
from softshard.cli.command import Command
from softshard.cli.result import print_result, write_stdout

if TYPE_CHECKING:
    from softshard.output.status import Status

__all__ = ["COMMAND", "render_status"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    parser.add_argument("--watch", action="store_true", help="repeat until the targets are complete")
    parser.add_argument(
        "--every", type=positive_number, default=5.0, metavar="SECONDS", help="with --watch: seconds between looks (5)"
    )


def _execute(arguments: argparse.Namespace) -> int:
    if arguments.watch:
        from softshard.cli.watch import watch_output

        return watch_output(arguments.out, every_seconds=arguments.every, as_json=arguments.json, write=write_stdout)
    from softshard.output.status import read_status

    status = read_status(arguments.out)
    print_result(arguments, status, render_status(status))
    return 0


def render_status(status: Status) -> str:
    """The state as lines of at most 80 columns."""
    from softshard.cli.sweep import render_sweep

    lines = [f"{status.out}: job {status.job}", ""]
    for stage in status.stages:
        lines.append(f"{stage.stage:<9} {'complete' if stage.complete else 'not complete'}")
        for name, value in stage.figures.items():
            if name == "sweep":
                lines += render_sweep(value)
                continue
            shown = f"{value:,}" if isinstance(value, int | float) else str(value)
            lines.append(f"{'':<9} {name.replace('_', ' '):<24} {shown}")
    if status.sequences:
        lines += ["", "One of its sequences:", f"softshard show {status.out} --sequence {status.sequences[0][:12]}"]
    return "\n".join(lines) + "\n"


COMMAND = Command(name="status", help="say how far an output folder is", add_arguments=_add_arguments, execute=_execute)
