"""`softshard schema`: print, write or check the published schemas."""

from __future__ import annotations

import argparse

from softshard.cli.command import Command
from softshard.cli.result import print_result, write_stdout
from softshard.errors import EXIT_DATA, JobInvalid

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        help="job, manifest, report, part, part-v2, reference or commands; without it, their names are listed",
    )
    parser.add_argument(
        "--write",
        metavar="FOLDER",
        help="write all schemas into a folder, and the reference pages into docs/ beside it",
    )
    parser.add_argument(
        "--check", metavar="FOLDER", nargs="?", const="schemas", help="compare with a folder (default: schemas)"
    )


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.cli.schemas import check_schemas, schema_texts, write_schemas

    if arguments.check is not None:
        drifted = check_schemas(arguments.check)
        lines = "".join(
            f"{path}: is missing or out of date; run `softshard schema --write {arguments.check}`\n" for path in drifted
        )
        print_result(arguments, {"drifted": drifted}, lines or f"{arguments.check}: up to date\n")
        return EXIT_DATA if drifted else 0
    if arguments.write is not None:
        written = write_schemas(arguments.write)
        print_result(arguments, {"written": written}, "".join(f"{path}\n" for path in written))
        return 0
    texts = schema_texts()
    if arguments.name is None:
        print_result(arguments, {"schemas": list(texts)}, "".join(f"{name}\n" for name in texts))
        return 0
    if arguments.name not in texts:
        problem = f"no such schema; known: {', '.join(texts)}"
        raise JobInvalid(file="softshard schema", place=arguments.name, problem=problem)
    write_stdout(texts[arguments.name])
    return 0


COMMAND = Command(
    name="schema",
    help="print, write or check the published schemas",
    add_arguments=_add_arguments,
    execute=_execute,
)
