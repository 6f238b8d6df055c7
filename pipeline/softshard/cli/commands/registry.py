"""All commands, in the order of `softshard --help`.

A new command is one module in this folder and one line below.
"""

from __future__ import annotations

from softshard.cli.command import Command
from softshard.cli.commands import blend, export, gc, plan, repair, run, schema, show, stages, status, verify

__all__ = ["COMMANDS"]

COMMANDS: tuple[Command, ...] = (
    run.COMMAND,
    *stages.COMMANDS,
    plan.COMMAND,
    status.COMMAND,
    verify.COMMAND,
    repair.COMMAND,
    gc.COMMAND,
    show.COMMAND,
    blend.COMMAND,
    export.COMMAND,
    schema.COMMAND,
)
