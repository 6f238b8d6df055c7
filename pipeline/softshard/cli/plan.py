"""What `softshard plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from softshard.cli.terminal import wrapped
from softshard.pilot.measure import Pilot, format_setting
from softshard.stages.plan import Plan
from softshard.stages.train.author_cap import CountedAuthors

__all__ = ["plan_values", "render_plan"]


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    pilot = None if plan.pilot is None else plan.pilot.model_dump(mode="json")
    return {**asdict(replace(plan, pilot=None)), "pilot": pilot}


def render_plan(plan: Plan) -> str:
    """The plan as lines of at most 80 columns."""
    left_out = ", ".join(f"{number:,} {name}" for name, number in plan.left_out.items())
    rows = [
        ("documents", f"{plan.documents:,}" + (f" (left out: {left_out})" if left_out else "")),
        ("tokens", f"{plan.tokens:,} in {plan.sequences:,} sequences"),
        ("positions", f"{plan.positions:,}"),
        ("parts", f"{plan.parts:,}"),
        ("target", plan.target + (f", for {plan.budget}" if plan.budget else "")),
        ("bytes", f"about {plan.bytes:,} at {plan.bytes_per_position:.1f} a position"),
        ("speed", f"{plan.tokens_per_second:,.0f} tokens a second and worker, {plan.speed_is}"),
        ("style teacher", f"{plan.training_hours:.3g} hours"),
        ("targets", f"{plan.scoring_hours:.3g} hours"),
        ("teacher in all", f"{plan.wall_hours:.3g} hours with {plan.workers} worker(s)"),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    rows.append(("then", f"{plan.num_trainings} training(s) of the student, {plan.trained_tokens:,} tokens in all"))
    rows.append(("authors", _of_authors(plan.authors)))
    lines = [f"{plan.out}: job {plan.job}", "", *(f"{name:<15} {value}" for name, value in rows)]
    if plan.authors is not None and plan.authors.refusal is not None:
        lines += ["", *wrapped(f"The run will end before any teacher is trained: {plan.authors.refusal}")]
    if plan.pilot is not None:
        lines += ["", *_table(plan.pilot), "", *_measured_on(plan, plan.pilot)]
    return "\n".join(lines) + "\n"


def _of_authors(authors: CountedAuthors | None) -> str:
    if authors is None:
        return "their shares cannot be told before there are targets"
    if authors.largest_share is None:
        return "nobody is counted against train.author_cap"
    return f"{authors.counted:,} counted, the largest has {authors.largest_share:.1%}, allowed are {authors.cap:.1%}"


def _table(pilot: Pilot) -> Iterator[str]:
    yield f"  {'kind':<10}{'setting':>9}{'entries':>9}{'bytes':>9}{'error':>10}{'angle':>8}{'left out':>10}{'run':>10}"
    for row in pilot.rows:
        yield (
            f"{'*' if row.sketch == pilot.chosen else ' '} {row.sketch.kind:<10}{format_setting(row.sketch):>9}"
            f"{row.mean_entries:>9.1f}{row.bytes_per_position:>9.1f}{row.mean_squared_error:>10.5f}"
            f"{row.gradient_angle_degrees:>8.2f}{row.mean_mass_left_out:>10.1%}{_human(row.num_bytes):>10}"
        )
    yield ""
    yield "* the target of the job. Entries (of one draw), bytes, mean squared error, angle"
    yield "in degrees between the gradients of what is stored and of the whole target, and"
    yield "mass that no draw ever stores: a position. Run: all parts together. Error and"
    yield "angle of a threshold are noise, which averages out; what is left out does not."


def _measured_on(plan: Plan, pilot: Pilot) -> Iterator[str]:
    yield f"Measured on {pilot.num_sequences:,} sequences, {pilot.num_labels:,} positions, with the teacher's model"
    yield "as it is" + ("; the style teacher is not there before the run." if plan.adapted_teacher else ".")
    if plan.budget:
        yield "The run finds its tau by a pilot of its own, with the teacher that it uses."


def _human(num_bytes: float) -> str:
    """Three digits and a unit, powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"
