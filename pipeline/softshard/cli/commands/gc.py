"""`softshard gc`: list, and with `--yes` remove, the files that no manifest names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument
from softshard.cli.command import Command
from softshard.cli.result import print_result

if TYPE_CHECKING:
    from softshard.maintenance.gc import Garbage

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    parser.add_argument("--yes", action="store_true", help="remove the listed files")
    parser.add_argument(
        "--older", action="store_true", help="also take older manifests, and the files that only they name"
    )


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.maintenance.gc import collect_garbage

    garbage = collect_garbage(arguments.out, remove=arguments.yes, older=arguments.older)
    print_result(arguments, garbage, _render(arguments.out, garbage))
    return 0


def _render(out: str, garbage: Garbage) -> str:
    """One line for each file, then their number and size."""
    lines = [f"{orphan.num_bytes:>14,}  {orphan.kind:<30} {orphan.path}" for orphan in garbage.files]
    done = "removed" if garbage.removed else "that no manifest names; --yes removes them"
    if garbage.files:
        lines.append(f"{out}: {len(garbage.files)} file(s), {garbage.num_bytes:,} bytes {done}")
    else:
        lines.append(f"{out}: every file is named by a manifest")
    if garbage.older:
        lines.append(
            f"kept: {len(garbage.older)} file(s), {garbage.older_bytes:,} bytes of older manifests, which their"
            " readers may still need; --older takes them too"
        )
    return "\n".join(lines) + "\n"


COMMAND = Command(
    name="gc",
    help="list, and with --yes remove, the files that no manifest names",
    add_arguments=_add_arguments,
    execute=_execute,
)
