"""Lineage events of OpenLineage."""

from __future__ import annotations

import json
import os

import pytest

from fakes.events import RUN, lineage, lines
from softshard.errors import JobInvalid
from softshard.telemetry.lineage import dataset_name, is_configured


def test_lineage_of_a_run_goes_from_its_sources_to_the_manifest(lineage_file, monkeypatch):
    monkeypatch.setenv("OPENLINEAGE_PARENT_ID", f"airflow/letters.targets/{RUN}")
    reporter = lineage([])
    reporter.event("run_started", run=RUN, job="letters", stages="targets")
    reporter.event("targets_complete", manifest="d" * 64, parts=3, sequences=12, positions=300, bytes=2700)
    reporter.event("run_finished", exit_code=0, seconds=1.0, error=None)
    start, complete = lines(lineage_file)
    for event in (start, complete):
        assert event["run"]["runId"] == RUN
        assert event["run"]["facets"]["parent"]["job"] == {
            "namespace": "airflow",
            "name": "letters.targets",
            "facets": {},
        }
        assert (event["job"]["namespace"], event["job"]["name"]) == ("softshard", "letters")
        assert [(one["namespace"], one["name"]) for one in event["inputs"]] == [("s3://corpora", "letters")]
    assert [start["eventType"], complete["eventType"]] == ["START", "COMPLETE"]
    (output,) = complete["outputs"]
    assert (output["namespace"], output["name"]) == ("file", "/srv/out/targets")
    assert output["facets"]["version"]["datasetVersion"] == "d" * 64
    written = output["outputFacets"]["outputStatistics"]
    assert (written["rowCount"], written["size"], written["fileCount"]) == (12, 2700, 3)


def test_lineage_of_a_run_that_fails_says_why(lineage_file):
    reporter = lineage([])
    reporter.event("run_started", run=RUN, job="letters", stages="targets")
    reporter.event("run_finished", exit_code=3, seconds=1.0, error="PartsFailed: two")
    event = lines(lineage_file)[-1]
    assert event["eventType"] == "FAIL"
    assert event["run"]["facets"]["errorMessage"]["message"] == "exit code 3: PartsFailed: two"


def test_lineage_that_cannot_be_sent_is_told_once_and_ends_nothing(monkeypatch):
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "http")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY", json.dumps({"total": 0}))
    told = []
    reporter = lineage(told)
    reporter.event("run_started", run=RUN, job="letters", stages="targets")
    reporter.event("run_finished", exit_code=0, seconds=1.0, error=None)
    assert len(told) == 1
    assert told[0].startswith("OpenLineage: START was not sent")


@pytest.mark.parametrize(
    ("name", "value"), [("OPENLINEAGE_PARENT_ID", "only/two"), ("OPENLINEAGE__TRANSPORT__TYPE", "pigeon")]
)
def test_lineage_settings_that_are_wrong_are_named(lineage_file, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(JobInvalid, match="OpenLineage"):
        lineage([])


def test_lineage_is_off_unless_it_is_configured(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not is_configured()
    (tmp_path / "openlineage.yml").write_text("transport: {type: noop}\n")
    assert is_configured()
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    assert not is_configured()


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/corpora/letters.jsonl", ("file", "/corpora/letters.jsonl")),
        ("file:///corpora/letters.jsonl", ("file", "/corpora/letters.jsonl")),
        ("s3://bucket/a/b/", ("s3://bucket", "a/b")),
        ("https://me:secret@host.example/a?token=abc", ("https://host.example", "a")),
    ],
)
def test_data_sets_have_the_names_that_openlineage_gives_them(uri, name):
    assert dataset_name(uri) == name
