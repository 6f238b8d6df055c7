"""The log of a run in JSON lines."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest

from fakes.events import RUN, a_run, fail_on, lines
from softshard.errors import JobInvalid
from softshard.telemetry.log import JsonLog, json_stderr, log_line

ROOT = Path(__file__).parents[2]


def test_log_line_says_when_what_and_where_in_the_run(tmp_path):
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    a_run(log, exit_code=3, error="PartsFailed: one")
    started, stage, part, _, retried, set_aside, finished_stage, finished = lines(tmp_path / "log.jsonl")
    assert started["event"] == "run_started"
    assert list(part)[:7] == ["time", "level", "event", "run", "job", "stage", "part"]
    assert datetime.fromisoformat(part["time"]).utcoffset().total_seconds() == 0
    assert part["time"].endswith("Z")
    assert (part["run"], part["job"], part["stage"]) == (RUN, "letters", "targets")
    assert (part["positions"], part["bytes"], part["worker"]) == (100, 900, "tcp://127.0.0.1:1")
    assert [line["level"] for line in (stage, part, retried, set_aside, finished)] == [
        "info",
        "info",
        "warning",
        "error",
        "error",
    ]
    assert finished_stage["stage"] == "targets"
    assert "stage" not in finished
    assert finished["exit_code"] == 3


@pytest.mark.parametrize(("exit_code", "level"), [(0, "info"), (75, "warning"), (1, "error"), (2, "error")])
def test_end_of_a_run_has_the_level_of_its_exit_code(tmp_path, exit_code, level):
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    log.event("run_finished", exit_code=exit_code, seconds=1.0, error=None)
    assert [line["level"] for line in lines(tmp_path / "log.jsonl")] == [level]


def test_log_goes_on_in_a_new_file_when_the_old_one_was_moved_away(tmp_path):
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    log.say("before")
    (tmp_path / "log.jsonl").rename(tmp_path / "log.jsonl.1")
    log.say("after")
    assert [line["message"] for line in lines(tmp_path / "log.jsonl.1")] == ["before"]
    assert [line["message"] for line in lines(tmp_path / "log.jsonl")] == ["after"]


def test_progress_is_in_the_log_at_its_start_and_end(tmp_path):
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    with log.progress("teacher", total=100, unit="%") as progress:
        for done in range(101):
            progress(done, note="loss 3.1")
    first, last = lines(tmp_path / "log.jsonl")
    assert (first["label"], first["done"], first["total"]) == ("teacher", 0, 100)
    assert (last["done"], last["note"]) == (100, "loss 3.1")
    assert last["seconds"] >= 0


def test_log_that_cannot_be_written_any_more_is_told_once_and_ends_nothing():
    told = []
    log = JsonLog("/dev/full", run=RUN, on_failure=told.append)
    for _ in range(3):
        log.say("nobody will read this")
    assert len(told) == 1
    assert "No space left" in told[0]


def test_log_in_a_folder_that_is_not_there_is_an_argument_that_is_wrong(tmp_path):
    with pytest.raises(JobInvalid, match=r"no-folder/log\.jsonl: cannot be written"):
        JsonLog(str(tmp_path / "no-folder/log.jsonl"), run=RUN, on_failure=fail_on)


def test_log_line_of_the_operation_page_has_the_keys_of_a_real_one(tmp_path):
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/operation.md").read_text(), flags=re.DOTALL)
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    a_run(log, parts=1)
    (part,) = [line for line in lines(tmp_path / "log.jsonl") if line["event"] == "part_committed"]
    assert list(json.loads(shown)) == list(part)


def test_whatever_libraries_write_to_stderr_is_json_where_the_log_goes_there(capsys):
    library = logging.Logger("library")
    own = log_line("message", message="one of ours")
    with json_stderr():
        library.addHandler(logging.StreamHandler())
        library.warning("Retrying in 1s\n[Retry 1/5].")
        sys.stderr.write(f"{own}\n\n")
        print("https://me:secret@hub.example/x", file=sys.stderr)
        sys.stderr.write("\r 50%|##")
        sys.stderr.write("\r100%|####")
    written = capsys.readouterr().err.splitlines()
    assert own in written
    said = [json.loads(line) for line in written]
    assert [line["message"] for line in said if line["event"] == "library_message"] == [
        "Retrying in 1s",
        "[Retry 1/5].",
        "https://***@hub.example/x",
        "50%|##",
        "100%|####",
    ]
