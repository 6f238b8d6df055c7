"""What a command tells machines: where it is set, and that no sink can end a run."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import yaml

from fakes.events import RUN, a_run, fail_on, lineage, lines, samples
from softshard.cli import main
from softshard.errors import ExtraMissing, JobInvalid, TryAgain, exit_code_for
from softshard.telemetry.metrics import MetricsReporter
from softshard.telemetry.sinks import Sinks, open_reporter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "extra", "open_it"),
    [
        (
            "prometheus_client",
            "metrics",
            lambda: MetricsReporter(file="x.prom", gateway=None, on_failure=fail_on),
        ),
        ("openlineage.client", "lineage", lambda: lineage([])),
    ],
)
def test_missing_extra_is_one_line_that_names_it_and_2(monkeypatch, module, extra, open_it):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExtraMissing, match=re.escape(f"softshard[{extra}]")) as raised:
        open_it()
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_json_on_stderr_takes_the_place_of_lines_for_people(capsys, tmp_path):
    reporter = open_reporter(Sinks(log="-"), run=RUN)
    reporter.say("hello")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "hello"


def test_exit_codes_are_those_of_the_errors():
    assert exit_code_for(TryAgain("x")) == 75
    assert exit_code_for(KeyboardInterrupt()) == 75
    assert exit_code_for(JobInvalid(file="f", place="", problem="p")) == 2
    assert exit_code_for(ZeroDivisionError()) == 1


def test_command_logs_its_run_from_start_to_end_on_stderr(tiny_job, tmp_path, capsys, lineage_file):
    job = tiny_job(tmp_path)
    metrics = tmp_path / "tiny.prom"
    assert main(["corpus", str(job), "--log", "-", "--metrics-file", str(metrics), "--json"]) == 0
    captured = capsys.readouterr()
    log = [json.loads(line) for line in captured.err.splitlines()]
    assert [log[0]["event"], log[-1]["event"]] == ["run_started", "run_finished"]
    assert {line["job"] for line in log} == {"tiny"}
    assert len({line["run"] for line in log}) == 1
    assert json.loads(captured.out)["job"] == "tiny"
    assert samples(metrics)["softshard_run_exit_code", None] == 0
    assert [event["eventType"] for event in lines(lineage_file)] == ["START", "COMPLETE"]


def test_settings_come_from_the_environment_too(tiny_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOFTSHARD_LOG", str(tmp_path / "log.jsonl"))
    monkeypatch.setenv("SOFTSHARD_METRICS_FILE", str(tmp_path / "tiny.prom"))
    assert main(["targets", str(tiny_job(tmp_path)), "--quiet"]) == 2
    assert lines(tmp_path / "log.jsonl")[-1]["exit_code"] == 2
    assert samples(tmp_path / "tiny.prom")["softshard_run_exit_code", None] == 2
    assert capsys.readouterr().err.startswith("softshard: ")


def test_job_file_that_is_wrong_is_in_the_log_too(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text("name: 1\n")
    assert main(["run", str(tmp_path / "job.yaml"), "--log", "-"]) == 2
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"], line["exit_code"]) for line in log] == [
        ("run_finished", "error", 2),
        ("failed", "error", 2),
    ]


def test_operation_page_names_every_event_and_alerts_on_metrics_that_there_are(tmp_path):
    page = (ROOT / "docs/operation.md").read_text()
    told = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        told |= set(re.findall(r'\.event\(\s*"([a-z_]+)"', path.read_text()))
    assert {"run_started", "part_committed", "stage_finished"} <= told
    assert {name for name in told if f"`{name}`" not in page} == set()
    file = tmp_path / "letters.prom"
    reporter = MetricsReporter(file=str(file), gateway=None, on_failure=fail_on)
    reporter.event("source_read", source="letters", documents=300, left_out=0.01)
    a_run(reporter)
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", page, flags=re.DOTALL)
    expressions = [rule["expr"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]]
    assert len(expressions) == 5
    used = {name for expression in expressions for name in re.findall(r"softshard_\w+", expression)}
    assert used <= {name for name, _ in samples(file)}


def test_log_on_stderr_is_json_alone_while_the_hub_is_away(tiny_job, tmp_path, monkeypatch, capsys):
    import datasets

    def away(*_, **__):
        logger = logging.Logger("a library")
        logger.addHandler(logging.StreamHandler())
        logger.warning("connection refused\nRetrying in 1s [Retry 1/5].")
        raise ConnectionError("the hub does not answer")

    monkeypatch.setattr(datasets, "load_dataset_builder", away)
    source = {"name": "s", "uri": "somebody/letters", "format": "datasets", "style": "plain"}
    sources = [{**source, "license": "CC0-1.0", "rights_basis": "owned"}]
    job = tiny_job(tmp_path, corpus={"sources": sources}, train={"retention": None})
    assert main(["corpus", str(job), "--log", "-"]) == 75
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    messages = [line["message"] for line in log if line["event"] == "library_message"]
    assert messages == ["connection refused", "Retrying in 1s [Retry 1/5]."]
    assert (log[-1]["event"], log[-1]["exit_code"]) == ("failed", 75)
