"""The command `softshard`: arguments in, one stage or the whole job out, and an exit code a scheduler can act on.

Results go to stdout, progress and errors to stderr. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from types import FrameType
from typing import Any

from softshard.cli.arguments import STAGE_HELP, make_parser
from softshard.errors import EXIT_BUG, EXIT_DATA, EXIT_TRY_AGAIN, SoftshardError, full_disk

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    arguments = make_parser(_functions()).parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    _quieten()
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except SoftshardError as error:
        return _fail(arguments, error, error.exit_code)
    except KeyboardInterrupt as error:
        what = "stopped; what is committed is kept, and the same command goes on from there"
        return _fail(arguments, error, EXIT_TRY_AGAIN, message=what)
    except Exception as error:  # noqa: BLE001 - the edge: what nothing else named is a bug, exit code 1
        # The folder of temporary files, and what libraries write, have no other place where this would be seen.
        if (full := full_disk(error)) is not None:
            return _fail(arguments, full, full.exit_code)
        return _fail(arguments, error, EXIT_BUG, message=f"a bug: {type(error).__name__}: {error}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _quieten() -> None:
    """Keep libraries' own bars and advice off the terminal; what a person set in the environment stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _fail(arguments: argparse.Namespace, error: BaseException, code: int, message: str | None = None) -> int:
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


def _print(arguments: argparse.Namespace, value: Any, text: str) -> None:
    if arguments.json:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        text = json.dumps(plain, ensure_ascii=False) + "\n"
    _write(text)


def _write(text: str) -> None:
    """Write a result; a reader that has read enough, such as `head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reporter(arguments: argparse.Namespace) -> Any:
    import uuid

    from softshard.telemetry.outlets import open_reporter

    return open_reporter(_outlets(arguments), run=str(uuid.uuid4()))


def _outlets(arguments: argparse.Namespace) -> Any:
    from softshard.telemetry.outlets import Outlets

    return Outlets(
        quiet=arguments.quiet,
        log=arguments.log,
        metrics_file=getattr(arguments, "metrics_file", None),
        push_gateway=getattr(arguments, "push_gateway", None),
    )


def _functions() -> dict[str, Callable[[argparse.Namespace], int]]:
    """By subcommand."""
    return {
        "run": _run,
        **{stage: _stage_runner(stage) for stage in STAGE_HELP},
        "plan": _plan,
        "status": _status,
        "verify": _verify,
        "repair": _repair,
        "gc": _gc,
        "show": _show,
        "blend": _blend,
        "export": _export,
        "schema": _schema,
    }


def _run(arguments: argparse.Namespace) -> int:
    from softshard.cli.reported_run import run_reported
    from softshard.cli.summary import render_summary, summary_values
    from softshard.stages.job import STAGES

    outcome = run_reported(arguments.job, stages=STAGES, outlets=_outlets(arguments))
    _print(arguments, summary_values(outcome), render_summary(outcome))
    return 0


def _stage_runner(stage: str) -> Callable[[argparse.Namespace], int]:
    def run_stage(arguments: argparse.Namespace) -> int:
        from softshard.cli.reported_run import run_reported
        from softshard.cli.status import render_status
        from softshard.output.status import read_status

        outcome = run_reported(arguments.job, stages=(stage,), outlets=_outlets(arguments))
        status = read_status(outcome.out)
        _print(arguments, status, render_status(status))
        return 0

    return run_stage


def _plan(arguments: argparse.Namespace) -> int:
    from softshard.cli.plan import plan_values, render_plan
    from softshard.config.job_file import load_job
    from softshard.stages.job import STAGES, refuse_without_holdout
    from softshard.stages.plan import make_plan

    job = load_job(arguments.job)
    refuse_without_holdout(job, STAGES)
    plan = make_plan(
        job,
        _reporter(arguments),
        tokens_per_second=arguments.tokens_per_second,
        price_per_hour=arguments.price_per_hour,
        num_pilot=arguments.pilot,
    )
    _print(arguments, plan_values(plan), render_plan(plan))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch:
        from softshard.cli.watch import watch_output

        return watch_output(arguments.out, every_seconds=arguments.every, as_json=arguments.json, write=_write)
    from softshard.cli.status import render_status
    from softshard.output.status import read_status

    status = read_status(arguments.out)
    _print(arguments, status, render_status(status))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.engine is not None and arguments.against_teacher is None:
        from softshard.errors import JobInvalid

        raise JobInvalid(file="softshard verify", place="--engine", problem="needs --against-teacher N")
    from softshard.maintenance.verify import render_verification, verify_output

    verification = verify_output(arguments.out, _reporter(arguments), deep=arguments.deep)
    text = render_verification(arguments.out, verification)
    if arguments.against_teacher is None or verification.problems:
        _print(arguments, verification, text)
        return EXIT_DATA if verification.problems else 0
    from softshard.maintenance.rescore import render_rescored, rescore

    rescored = rescore(arguments.out, _reporter(arguments), num=arguments.against_teacher, engine=arguments.engine)
    values = {**asdict(verification), "against_teacher": asdict(rescored)}
    _print(arguments, values, text + render_rescored(arguments.out, rescored))
    return EXIT_DATA if rescored.num_beyond else 0


def _repair(arguments: argparse.Namespace) -> int:
    from softshard.maintenance.repair import render_repaired, repair

    repaired = repair(arguments.out, _reporter(arguments), deep=arguments.deep)
    _print(arguments, repaired, render_repaired(arguments.out, repaired))
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from softshard.maintenance.gc import collect_garbage, render_garbage

    garbage = collect_garbage(arguments.out, remove=arguments.yes, older=arguments.older)
    _print(arguments, garbage, render_garbage(arguments.out, garbage))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from softshard.cli.show import render, show_sequence

    shown = show_sequence(arguments.out, arguments.sequence)
    _print(arguments, shown, render(shown))
    return 0


def _blend(arguments: argparse.Namespace) -> int:
    from softshard.cli.blend import render_blend
    from softshard.data.blend_summary import summarize_blend

    blending = summarize_blend(arguments.outs, weights=arguments.weights)
    _print(arguments, blending, render_blend(blending))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from softshard.stages.export import export_model, render_exported

    exported = export_model(arguments.out, arguments.to, dtype=arguments.dtype)
    _print(arguments, exported, render_exported(exported))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from softshard.cli.schemas import check_schemas, schema_texts, write_schemas

    if arguments.check is not None:
        drifted = check_schemas(arguments.check)
        lines = "".join(f"{name}: is not what `softshard schema --write {arguments.check}` gives\n" for name in drifted)
        _print(arguments, {"drifted": drifted}, lines or f"{arguments.check}: up to date\n")
        return EXIT_DATA if drifted else 0
    if arguments.write is not None:
        written = write_schemas(arguments.write)
        _print(arguments, {"written": written}, "".join(f"{name}\n" for name in written))
        return 0
    texts = schema_texts()
    if arguments.name is None:
        _print(arguments, {"schemas": list(texts)}, "".join(f"{name}\n" for name in texts))
        return 0
    if arguments.name not in texts:
        from softshard.errors import JobInvalid

        raise JobInvalid(
            file="softshard schema", place=arguments.name, problem=f"no such schema; known: {', '.join(texts)}"
        )
    _write(texts[arguments.name])
    return 0
