"""The command reference, `docs/commands.md`: every command with its arguments, generated from the registry."""

from __future__ import annotations

import argparse

from softshard.cli.command import Command
from softshard.cli.commands.registry import COMMANDS

__all__ = ["command_reference"]

_INTRODUCTION = """# Commands

`softshard COMMAND --help` says the same; this page is generated from the same declarations by `make schema`.

Every command takes `--json`, which prints the result as one JSON object, and `--debug`, which shows the traceback of an
error. Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a bug, 2 job or arguments, 3 bad data,
75 try again.
"""


def command_reference() -> str:
    """The reference as Markdown."""
    lines = [_INTRODUCTION]
    for command in COMMANDS:
        lines += _section(command)
    return "\n".join(lines).rstrip() + "\n"


def _section(command: Command) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    lines = [f"## `softshard {command.name}`", "", f"{command.help[0].upper()}{command.help[1:]}.", ""]
    lines += ["| argument | |", "|---|---|"]
    return [*lines, *(f"| `{_usage(action)}` | {action.help} |" for action in parser._actions), ""]


def _usage(action: argparse.Action) -> str:
    """An argument as it is written: its flag, if any, and its value."""
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(map(str, action.choices or [action.dest])))
    if action.nargs == "?":
        value = f"[{value}]"
    if action.nargs == "+":
        value = f"{value} ..."
    return " ".join([*action.option_strings, value]).strip().replace("|", "\\|")
