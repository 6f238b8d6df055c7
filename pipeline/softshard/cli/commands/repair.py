"""`softshard repair`: make again exactly what is bad or missing in an output."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument, add_progress_arguments
from softshard.cli.command import Command
from softshard.cli.result import print_result

if TYPE_CHECKING:
    from softshard.maintenance.repair import Repaired

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    add_progress_arguments(parser)
    parser.add_argument("--deep", action="store_true", help="decode every sketch to find what is bad")


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.cli.reporting import make_reporter
    from softshard.maintenance.repair import repair

    repaired = repair(arguments.out, make_reporter(arguments), deep=arguments.deep)
    print_result(arguments, repaired, _render(arguments.out, repaired))
    return 0


def _render(out: str, repaired: Repaired) -> str:
    """What was done, one line for each file."""
    lines = [f"set aside: {path}" for path in repaired.set_aside]
    lines += [f"made again: {path}" for path in repaired.made]
    lines += [f"left to `softshard run`, which trains it again: {path}" for path in repaired.left]
    if repaired.manifest_before is not None and repaired.manifest != repaired.manifest_before:
        lines.append(
            f"the manifest is {str(repaired.manifest)[:16]} now and was {repaired.manifest_before[:16]}: what was"
            " computed again has other bytes, within the noise of its engine or hardware"
        )
    done = f"{repaired.num_problems} problem(s), {len(repaired.made)} file(s) made again"
    lines.append(f"{out}: {done if repaired.num_problems else 'nothing to repair'}")
    return "\n".join(lines) + "\n"


COMMAND = Command(
    name="repair", help="make again exactly what is bad or missing", add_arguments=_add_arguments, execute=_execute
)
