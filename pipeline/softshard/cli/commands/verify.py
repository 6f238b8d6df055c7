"""`softshard verify`: read an output again and check it, with `--against-teacher` by scoring some of it again."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument, add_progress_arguments, positive_count
from softshard.cli.command import Command
from softshard.cli.result import print_result
from softshard.errors import EXIT_DATA, JobInvalid

if TYPE_CHECKING:
    from softshard.maintenance.rescore import Rescored
    from softshard.maintenance.verify import OutputVerification

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    add_progress_arguments(parser)
    parser.add_argument("--deep", action="store_true", help="decode every sketch and check its mass")
    parser.add_argument(
        "--against-teacher",
        type=positive_count,
        metavar="N",
        help="then score N sequences again and compare them with what is stored",
    )
    parser.add_argument(
        "--engine",
        type=_engine_name,
        metavar="ENGINE",
        help="with --against-teacher: the engine to score with, a value of `teacher.engine` (default: the job's)",
    )


def _engine_name(text: str) -> str:
    from softshard.config.teacher import ENGINE_NAMES

    if text not in ENGINE_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not an engine; choose from {', '.join(ENGINE_NAMES)}")
    return text


def _execute(arguments: argparse.Namespace) -> int:
    if arguments.engine is not None and arguments.against_teacher is None:
        raise JobInvalid(file="softshard verify", place="--engine", problem="needs --against-teacher N")
    from softshard.cli.reporting import make_reporter
    from softshard.maintenance.verify import verify_output

    verification = verify_output(arguments.out, make_reporter(arguments), deep=arguments.deep)
    text = _render_verification(arguments.out, verification)
    if arguments.against_teacher is None or verification.problems:
        print_result(arguments, verification, text)
        return EXIT_DATA if verification.problems else 0
    from softshard.maintenance.rescore import rescore

    rescored = rescore(arguments.out, make_reporter(arguments), num=arguments.against_teacher, engine=arguments.engine)
    values = {**asdict(verification), "against_teacher": asdict(rescored)}
    print_result(arguments, values, text + _render_rescored(arguments.out, rescored))
    return EXIT_DATA if rescored.num_beyond else 0


def _render_verification(out: str, verification: OutputVerification) -> str:
    """What was checked, and one line for each problem."""
    read = "decoded" if verification.deep else "read and hashed"
    lines = [
        f"{out}: {verification.num_parts} parts {read}, {verification.num_sequences:,} sequences,"
        f" {verification.num_labels:,} positions, {verification.num_bytes:,} bytes;"
        f" {verification.num_slices} slices of the corpus, {verification.num_adapters} adapters",
        *verification.problems,
        *verification.notes,
    ]
    if verification.unnamed:
        kinds = Counter(orphan.kind for orphan in verification.unnamed)
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(
            f"{len(verification.unnamed)} file(s) that no manifest in use names ({counted}),"
            f" first {verification.unnamed[0].path}: no reader opens them, `softshard gc` lists them"
        )
    problems = len(verification.problems)
    lines.append(f"{problems} problem(s); `softshard repair {out}` repairs them" if problems else "no problems found")
    return "\n".join(lines) + "\n"


def _render_rescored(out: str, rescored: Rescored) -> str:
    """How far the stored targets are from the teacher, in lines of at most 80 columns."""
    verdict = "the stored targets agree with the teacher"
    if rescored.num_beyond:
        verdict = f"{rescored.num_beyond} label(s) or head entries differ by more than that"
    return (
        f"{out}: {rescored.num_sequences} sequences, {rescored.num_labels:,} positions"
        f" scored again ({', '.join(rescored.engines)})\n"
        f"labels: differ by {rescored.label_nats_mean:.4f} nats on average, at most {rescored.label_nats_max:.4f}\n"
        f"heads:  differ by {rescored.head_weight_mean:.5f} of weight, at most {rescored.head_weight_max:.5f}\n"
        f"noise of the engine: {rescored.noise_nats:.2g} nats;"
        f" allowed beyond the grid: {rescored.allowed_nats:.2g} nats\n"
        f"{verdict}\n"
    )


COMMAND = Command(
    name="verify",
    help="read corpus, adapters and parts again and check them",
    add_arguments=_add_arguments,
    execute=_execute,
)
