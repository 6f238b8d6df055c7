"""`softshard plan`: what a job would do and cost, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from softshard.cli.arguments import add_job_arguments, positive_number
from softshard.cli.command import Command
from softshard.cli.result import print_result
from softshard.cli.terminal import printable, wrapped

if TYPE_CHECKING:
    from softshard.pilot.measure import Pilot
    from softshard.stages.plan import Plan
    from softshard.stages.train.author_cap import CountedAuthors

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument(
        "--tokens-per-second",
        type=positive_number,
        metavar="N",
        help="speed of one worker; measured when it is not given",
    )
    parser.add_argument("--price-per-hour", type=positive_number, metavar="P", help="price of one worker for one hour")
    parser.add_argument(
        "--pilot",
        type=_pilot_size,
        metavar="N",
        help="measure on N sequences, 2 or more, what each kind of target costs and keeps",
    )


def _pilot_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of sequences; a pilot needs 2 or more")
    return int(text)


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.cli.job_or_output import job_named
    from softshard.cli.reporting import make_reporter
    from softshard.stages import STAGES
    from softshard.stages.job import refuse_without_holdout
    from softshard.stages.plan import make_plan

    job = job_named(arguments.job)
    refuse_without_holdout(job, STAGES)
    plan = make_plan(
        job,
        make_reporter(arguments),
        tokens_per_second=arguments.tokens_per_second,
        price_per_hour=arguments.price_per_hour,
        num_pilot=arguments.pilot,
    )
    print_result(arguments, _plan_values(plan), _render(plan))
    return 0


def _plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    pilot = None if plan.pilot is None else plan.pilot.model_dump(mode="json")
    return {**asdict(replace(plan, pilot=None)), "pilot": pilot}


def _render(plan: Plan) -> str:
    """The plan as lines of at most 80 columns, but for those that name a file."""
    left_out = ", ".join(f"{number:,} {name}" for name, number in plan.left_out.items())
    rows = [
        ("documents", f"{plan.documents:,}" + (f" (left out: {left_out})" if left_out else "")),
        ("tokens", f"{plan.tokens:,} in {plan.sequences:,} sequences"),
        ("positions", f"{plan.positions:,}"),
        ("hold-out", f"{plan.holdout_documents:,} document(s), {plan.holdout_tokens:,} tokens"),
        ("parts", f"{plan.parts:,}"),
        ("target", plan.target + (f", for {plan.budget}" if plan.budget else "")),
        ("bytes", f"about {plan.bytes:,} at {plan.bytes_per_position:.1f} per position"),
        ("speed", f"{plan.tokens_per_second:,.0f} tokens per second and worker, {plan.speed_is}"),
        ("style teacher", _format_hours(plan.training_hours)),
        ("targets", _format_hours(plan.scoring_hours)),
        ("teacher in all", f"{_format_hours(plan.wall_hours)} with {plan.workers} worker(s)"),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    rows.append(("then", f"{plan.num_trainings} training(s) of the student, {plan.trained_tokens:,} tokens in all"))
    rows += _student_rows(plan)
    rows.append(("authors", _describe_authors(plan.authors)))
    lines = [f"{plan.out}: job {plan.job}", "", *(f"{name:<15} {value}" for name, value in rows)]
    for warning in plan.warnings:
        lines += ["", *wrapped(f"Warning: {warning}.")]
    for name, text in plan.not_read.items():
        lines += ["", printable(f"Source {name}: {text}")]
    if plan.authors is not None and plan.authors.refusal is not None:
        lines += ["", *wrapped(f"The run fails before any teacher is trained: {plan.authors.refusal}")]
    if plan.pilot is not None:
        lines += ["", *_table(plan.pilot), "", *_measured_on(plan, plan.pilot)]
    return "\n".join(lines) + "\n"


def _student_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Times of the student, and memory, as far as they are known."""
    student, weights = plan.student, plan.weight_bytes
    if student.training_hours is None or student.evaluation_hours is None:
        yield "training", f"{student.steps:,} step(s) each; time not measured:"
        yield "", f"{student.not_measured}"
        yield "evaluation", "not measured"
    else:
        yield (
            "training",
            f"{student.steps:,} step(s) each; all {_format_hours(student.training_hours)} at the teacher's speed",
        )
        yield (
            "evaluation",
            f"{_format_hours(student.evaluation_hours)} for the hold-out; the report's samples: not measured",
        )
    yield (
        "memory",
        f"{_format_bytes(weights.teacher)} of weights per worker, {_format_bytes(weights.student)} for the student;",
    )
    peak = "" if plan.peak_bytes is None else f"{_format_bytes(plan.peak_bytes)} in all while scoring; "
    yield "", f"{peak}{'training' if peak else 'activations and gradients'}: not measured"


def _format_hours(hours: float) -> str:
    """A time in the unit that gives it one to three digits."""
    seconds = 3600 * hours
    if seconds < 1:
        return "under 1 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3570 else f"{hours:.3g} hours"


def _describe_authors(authors: CountedAuthors | None) -> str:
    if authors is None:
        return "their shares are not known before there are targets"
    if authors.largest_share is None:
        return "none is counted against train.author_cap"
    return f"{authors.counted:,} counted, the largest share is {authors.largest_share:.1%}, allowed {authors.cap:.1%}"


def _table(pilot: Pilot) -> Iterator[str]:
    yield f"  {'kind':<10}{'setting':>9}{'entries':>9}{'bytes':>9}{'error':>10}{'angle':>8}{'left out':>10}{'run':>10}"
    for row in pilot.rows:
        yield (
            f"{'*' if row.sketch == pilot.chosen else ' '} {row.sketch.kind:<10}{row.sketch.setting:>9}"
            f"{row.mean_entries:>9.1f}{row.bytes_per_position:>9.1f}{row.mean_squared_error:>10.5f}"
            f"{row.gradient_angle_degrees:>8.2f}{row.mean_mass_left_out:>10.1%}{_format_bytes(row.num_bytes):>10}"
        )
    yield ""
    yield "* the target of the job. Per position: entries of one draw, bytes, mean squared"
    yield "error, angle in degrees between the gradients of the stored and of the whole"
    yield "target, and mass that no draw ever stores. Run: all parts together. Error and"
    yield "angle of a threshold are noise, which averages out; mass left out does not."


def _measured_on(plan: Plan, pilot: Pilot) -> Iterator[str]:
    yield f"Measured on {pilot.num_sequences:,} sequences, {pilot.num_labels:,} positions, with the teacher's model"
    yield "as it is" + ("; the style teacher is trained only by the run." if plan.adapted_teacher else ".")
    if plan.budget:
        yield "The run finds its tau by a pilot of its own, with the teacher that it uses."


def _format_bytes(num_bytes: float) -> str:
    """The size with three digits and a unit, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"


COMMAND = Command(
    name="plan",
    help="say what a job would do and cost, before anything runs",
    add_arguments=_add_arguments,
    execute=_execute,
)
