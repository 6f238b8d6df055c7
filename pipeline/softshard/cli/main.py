"""The entry point of the command `softshard`: parses arguments, executes one command, returns an exit code.

Results go to stdout, progress and errors to stderr. A scheduler can act on the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from softshard.cli.arguments import make_parser
from softshard.cli.command import Command
from softshard.cli.commands.registry import COMMANDS
from softshard.cli.job_or_output import output_named
from softshard.errors import EXIT_BUG, EXIT_TRY_AGAIN, SoftshardError, full_disk

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Execute the command that `argv` (by default the process's arguments) names; returns the exit code."""
    arguments = make_parser(COMMANDS).parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    _silence_libraries()
    with _stderr_as_asked(arguments):
        return _execute(arguments)


def _stderr_as_asked(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Lines of JSON alone on stderr where the log goes there."""
    from softshard.telemetry.log import STDERR, json_stderr

    return json_stderr() if getattr(arguments, "log", None) == STDERR else contextlib.nullcontext()


def _execute(arguments: argparse.Namespace) -> int:
    """Execute the command; an error is written to stderr and becomes the exit code."""
    try:
        command: Command = arguments.command
        if "out" in arguments:
            arguments.out = output_named(arguments.out)
        return command.execute(arguments)
    except SoftshardError as error:
        return _fail(arguments, error, error.exit_code)
    except KeyboardInterrupt as error:
        message = "stopped; what is committed is kept, and the same command continues from there"
        return _fail(arguments, error, EXIT_TRY_AGAIN, message=message)
    except Exception as error:  # noqa: BLE001 - the edge: an error that nothing else named is a bug, exit code 1
        # A full disk under the folder of temporary files, or under a library's own files, shows up only here.
        if (full := full_disk(error)) is not None:
            return _fail(arguments, full, full.exit_code)
        return _fail(arguments, error, EXIT_BUG, message=f"a bug: {type(error).__name__}: {error}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _silence_libraries() -> None:
    """Keep the progress bars and advice of libraries off the terminal; what the environment sets already is kept."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(arguments: argparse.Namespace, error: BaseException, code: int, message: str | None = None) -> int:
    """Write an error to stderr on one line, as JSON where the log goes there; returns the exit code."""
    if arguments.debug:
        import traceback

        traceback.print_exception(error)
    hint = "" if arguments.debug or code != EXIT_BUG else " (--debug shows where)"
    from softshard.telemetry.log import STDERR, log_line
    from softshard.telemetry.redaction import without_credentials

    text = without_credentials(" ".join((message or str(error)).split()) + hint)
    if getattr(arguments, "log", None) == STDERR:
        line = log_line("failed", "warning" if code == EXIT_TRY_AGAIN else "error", exit_code=code, message=text)
    else:
        line = f"softshard: {text}"
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(line + "\n")
    return code
