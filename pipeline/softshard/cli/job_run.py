"""Running stages of a job file from the command line, with events for logs, metrics and lineage.

Whatever ends the run, its last event is `run_finished` with the exit code.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

from softshard.cli.job_or_output import job_named
from softshard.cli.memory import keep_freed_memory
from softshard.config import Job
from softshard.errors import exit_code_for
from softshard.telemetry import FanOut
from softshard.telemetry.lineage import LineageReporter, dataset_name, is_configured
from softshard.telemetry.redaction import without_credentials
from softshard.telemetry.sinks import Sinks, add_metrics, open_reporter, warn

if TYPE_CHECKING:
    from softshard.stages.job import Outcome

__all__ = ["run_named_job"]


def run_named_job(argument: str, *, stages: Collection[str], sinks: Sinks) -> Outcome:
    """Run some stages of the job that a job file or an output names; sends the events of the run to every sink.

    Raises:
        ExtraMissing: an outlet needs a package that is not installed.
        JobInvalid: the job file or an outlet is wrong.
        SoftshardError: see `run_job`.
    """
    run = str(uuid.uuid4())
    reporter = open_reporter(sinks, run=run)
    started = time.monotonic()
    try:
        outcome = _run(job_named(argument), reporter, stages, sinks=sinks, run=run)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _finish(reporter, exit_code_for(error), started, reason)
        raise
    _finish(reporter, 0, started, None)
    return outcome


def _finish(reporter: FanOut, exit_code: int, started: float, error: str | None) -> None:
    seconds = round(time.monotonic() - started, 3)
    reporter.event("run_finished", exit_code=exit_code, seconds=seconds, error=error)


def _run(job: Job, reporter: FanOut, stages: Collection[str], *, sinks: Sinks, run: str) -> Outcome:
    add_metrics(reporter, sinks)
    if is_configured():
        reporter.add(_lineage(job, reporter, run=run))
    reporter.event("run_started", run=run, job=job.name, stages=",".join(stages))
    if sinks.shows_lines:
        _announce(job)
    keep_freed_memory()
    # The imports take seconds.
    from softshard.stages.job import run_job

    outcome = run_job(job, reporter, stages=stages, run=run)
    manifest = outcome.manifest
    if manifest is not None:
        reporter.event(
            "targets_complete",
            manifest=manifest.digest,
            parts=manifest.totals.num_parts,
            sequences=manifest.totals.num_sequences,
            positions=manifest.totals.num_labels,
            bytes=manifest.totals.num_bytes,
        )
    return outcome


def _announce(job: Job) -> None:
    """Tell a person at a terminal, before anything that takes time, that the job file is read and where results go."""
    if sys.stderr.isatty():
        sys.stderr.write(f"softshard: job {job.name}, output {without_credentials(job.out)}\n")
        sys.stderr.flush()


def _lineage(job: Job, reporter: FanOut, *, run: str) -> LineageReporter:
    inputs = [
        dataset_name(source.uri) if source.hub is None else (source.hub, source.uri) for source in job.corpus.sources
    ]
    return LineageReporter(
        run=run,
        job=job.name,
        inputs=inputs,
        output=dataset_name(f"{job.out.rstrip('/')}/targets"),
        on_failure=partial(warn, reporter),
    )
