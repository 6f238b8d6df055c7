"""`softshard run`: every stage of a job that is not done yet, and a summary of the results at 80 columns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softshard.cli.arguments import add_job_arguments, add_metrics_arguments
from softshard.cli.command import Command
from softshard.cli.result import print_result
from softshard.cli.terminal import WIDTH, wrapped

if TYPE_CHECKING:
    from softshard.evaluate.report import Example, Report
    from softshard.stages.job import Outcome

__all__ = ["COMMAND", "render_summary"]

_NUM_EXAMPLES = 3
_COLUMNS = {"base": "base", "ce": "CE", "adapter": "adapter"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    add_metrics_arguments(parser)


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.cli.job_run import run_named_job
    from softshard.cli.reporting import make_sinks
    from softshard.stages import STAGES

    outcome = run_named_job(arguments.job, stages=STAGES, sinks=make_sinks(arguments))
    print_result(arguments, _summary_values(outcome), render_summary(outcome))
    return 0


def _summary_values(outcome: Outcome) -> dict[str, Any]:
    """The summary as plain values."""
    from softshard.finetune.sweep import sweep_rows

    report, trained = outcome.report, outcome.trained
    values: dict[str, Any] = {"out": outcome.out, "seconds": round(outcome.seconds, 1)}
    if outcome.manifest is not None:
        values["manifest"] = outcome.manifest.digest
    if trained is not None:
        values["adapter_folder"] = f"{outcome.out}/adapter/{trained.adapter.folder}"
        if trained.sweep:
            values["sweep"] = sweep_rows(trained)
    if report is not None:
        values["report"] = f"{outcome.out}/report/index.html"
        values["targets"] = report.targets.model_dump(mode="json")
        for name in ("base", "ce", "adapter"):
            metrics = getattr(report, name)
            values[name] = None if metrics is None else metrics.model_dump(mode="json")
    return values


def render_summary(outcome: Outcome) -> str:
    """The summary as lines of at most 80 columns."""
    from softshard.cli.sweep import render_sweep
    from softshard.finetune.sweep import sweep_rows

    report, trained = outcome.report, outcome.trained
    assert report is not None
    assert trained is not None
    targets = report.targets
    lines = [
        "",
        f"Targets: {targets.parts} parts, {targets.positions:,} positions, {targets.bytes_per_position:.1f} bytes and"
        f" {targets.mean_entries:.1f} entries per position",
        f"Fidelity: mean squared error {targets.mean_squared_error:.4f},"
        f" gradient angle {targets.gradient_angle_degrees:.1f} degrees",
        "",
        *_table(report),
        "",
        *_difference(report),
        *(["", *render_sweep(sweep_rows(trained))] if trained.sweep else []),
    ]
    for number, example in enumerate(report.examples[:_NUM_EXAMPLES], 1):
        lines += ["", f"--- {number} " + "-" * (WIDTH - 6), *_example(example)]
    lines += [
        "",
        f"Adapter: {outcome.out}/adapter/{trained.adapter.folder}",
        f"Report:  {Path(outcome.out) / 'report' / 'index.html'}",
        f"{outcome.seconds:.0f} s",
    ]
    return "\n".join(lines) + "\n"


def _table(report: Report) -> list[str]:
    from softshard.evaluate.metrics import METRICS

    columns = report.models
    holdout = report.holdout
    head = f"hold-out: {holdout.documents} documents, {holdout.labels:,} tokens"
    lines = [f"{head:<44}" + "".join(f"{_COLUMNS[name]:>10}" for name in columns)]
    for metric in METRICS:
        values = [getattr(model, metric.key) for model in columns.values()]
        if metric.short_title is not None and any(value is not None for value in values):
            cells = ["-" if value is None else metric.plain(value) for value in values]
            lines.append(f"{metric.short_title:<44}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _difference(report: Report) -> list[str]:
    lines = []
    for name, difference in (("base", report.adapter_minus_base), ("CE", report.adapter_minus_ce)):
        if difference is not None:
            error = difference.standard_error_nats
            spread = "" if error is None else f" (standard error {error:.3f})"
            lines.append(f"adapter minus {name}: {difference.difference_nats:+.3f} nats per token{spread}")
    return lines


def _example(example: Example) -> list[str]:
    parts = [("beginning", example.prompt), ("base", example.base), ("adapter", example.adapter)]
    lines: list[str] = []
    for name, text in parts:
        rows = wrapped(text.strip(), indent=11) or [" " * 11 + "(nothing)"]
        lines += [f"{name:<11}{rows[0][11:]}", *rows[1:]]
    return lines


COMMAND = Command(
    name="run",
    help="run every stage of the job that is not done yet",
    add_arguments=_add_arguments,
    execute=_execute,
)
