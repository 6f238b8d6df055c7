"""Events of a run, and what reads the log lines, metrics and lineage events that come of them."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from softshard.telemetry import SilentReporter
from softshard.telemetry.lineage import LineageReporter, dataset_name

RUN = "11111111-2222-4333-8444-555555555555"


class Listener(SilentReporter):
    """Keeps the lines for people in `said`, and the events with their values in `events`."""

    def __init__(self):
        self.said, self.events = [], []

    def say(self, message):
        self.said.append(message)

    def event(self, name, /, **values):
        self.events.append((name, values))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(path):
    families = text_string_to_metric_families(path.read_text())
    return {
        (sample.name, sample.labels.get("state") or sample.labels.get("stage")): sample.value
        for family in families
        for sample in family.samples
    }


def fail_on(message):
    pytest.fail(message)


def a_run(reporter, *, exit_code=0, error=None, parts=2):
    reporter.event("run_started", run=RUN, job="letters", stages="targets")
    reporter.event("stage_started", stage="targets")
    for number in range(parts):
        values = {"positions": 100, "bytes": 900, "sequences": 4, "seconds": 0.5, "worker": "tcp://127.0.0.1:1"}
        reporter.event("part_committed", part=f"{number:032x}", **values)
    reporter.event("part_retried", part="f" * 32, attempt=1, reason="OSError: gone")
    reporter.event("part_set_aside", part="f" * 32, attempt=3, reason="OSError: gone")
    reporter.event("stage_finished", stage="targets", seconds=1.5)
    reporter.event("run_finished", exit_code=exit_code, seconds=2.5, error=error)


def lineage(told):
    return LineageReporter(
        run=RUN,
        job="letters",
        inputs=[dataset_name("s3://me:secret@corpora/letters/")],
        output=("file", "/srv/out/targets"),
        on_failure=told.append,
    )
