"""What a run tells machines: JSON lines, metrics and lineage events, and that none of them can end it."""

import base64
import http.server
import json
import os
import re
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from softshard.cli import main
from softshard.errors import ExtraMissing, JobInvalid, TryAgain, exit_code_for
from softshard.telemetry import FanOut, SilentReporter
from softshard.telemetry.lineage import LineageReporter, dataset_name, is_configured
from softshard.telemetry.log import JsonLog
from softshard.telemetry.metrics import MetricsReporter, RunMetrics
from softshard.telemetry.redaction import without_credentials
from softshard.telemetry.sinks import Sinks, open_reporter

ROOT = Path(__file__).parents[2]
RUN = "11111111-2222-4333-8444-555555555555"


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


class Gateway(http.server.BaseHTTPRequestHandler):
    """Keeps what is pushed; answers with `status`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers.get("Authorization"), body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def gateway():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    server.received, server.status = [], 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("cannot read s3://AKIAEXAMPLE:wJalr/XUtn@bucket/key: 403", "cannot read s3://***@bucket/key: 403"),
        ("http://user:pass@host:9091/metrics", "http://***@host:9091/metrics"),
        ("https://b.example/k?X-Amz-Signature=abc12&part=2", "https://b.example/k?X-Amz-Signature=***&part=2"),
        ("env AWS_SECRET_ACCESS_KEY=wJalrXUtn is set", "env AWS_SECRET_ACCESS_KEY=*** is set"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer ***"),
        ("tcp://127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("train.optimizer.batch_tokens=512, mail a@b.example", "train.optimizer.batch_tokens=512, mail a@b.example"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
    ],
)
def test_credentials_are_taken_out_and_nothing_else(text, hidden):
    assert without_credentials(text) == hidden


def test_no_outlet_hears_a_credential(tmp_path):
    reporter = FanOut(SilentReporter(), JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on))
    reporter.say("reading s3://me:secret@bucket/x")
    reporter.event("part_retried", part="p", attempt=1, reason="403 at s3://me:secret@bucket/x")
    with reporter.progress("s3://me:secret@bucket", total=1, unit="parts") as progress:
        progress(1, note="s3://me:secret@bucket")
    text = (tmp_path / "log.jsonl").read_text()
    assert "secret" not in text
    assert text.count("s3://***@bucket") == 5


def test_metrics_are_the_sums_of_the_events(tmp_path):
    file = tmp_path / "letters.prom"
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on), parts=3)
    found = samples(file)
    assert found["softshard_positions_total", None] == 300
    assert found["softshard_bytes_total", None] == 2700
    assert found["softshard_sequences_total", None] == 12
    assert found["softshard_parts_total", "committed"] == 3
    assert found["softshard_parts_total", "retried"] == 1
    assert found["softshard_parts_total", "set_aside"] == 1
    assert found["softshard_stage_duration_seconds", "targets"] == 1.5
    assert found["softshard_run_exit_code", None] == 0
    assert found["softshard_run_duration_seconds", None] == 2.5
    assert found["softshard_last_success_timestamp_seconds", None] == found["softshard_run_end_timestamp_seconds", None]
    assert list(tmp_path.iterdir()) == [file]


def test_every_metric_follows_the_conventions_for_names_and_has_the_job(tmp_path):
    file = tmp_path / "letters.prom"
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on))
    for family in text_string_to_metric_families(file.read_text()):
        assert re.fullmatch(r"softshard_[a-z_]+", family.name)
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["job_name"] == "letters"
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert "job" not in sample.labels


def test_metrics_page_documents_every_metric(tmp_path):
    file = tmp_path / "letters.prom"
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on))
    page = (ROOT / "docs/operation.md").read_text()
    names = {name for name, _ in samples(file)}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_tokens_a_second_are_those_of_the_last_five_minutes():
    now = [1000.0]
    metrics = RunMetrics(clock=lambda: now[0])

    def rate():
        families = {family.name: family for family in metrics.collect()}
        return families["softshard_tokens_per_second"].samples[0].value

    metrics.take("stage_started", {"stage": "targets"})
    for _ in range(10):
        now[0] += 10
        metrics.take("part_committed", {"positions": 500, "bytes": 1, "sequences": 1})
    assert rate() == 50.0
    now[0] += 1000
    assert rate() == 0.0


def test_last_success_outlives_a_run_that_fails(tmp_path):
    file = tmp_path / "letters.prom"
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on))
    success = samples(file)["softshard_last_success_timestamp_seconds", None]
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on), exit_code=3, error="bad")
    after = samples(file)
    assert after["softshard_run_exit_code", None] == 3
    assert after["softshard_last_success_timestamp_seconds", None] == success


def test_run_that_is_refused_for_another_leaves_its_metrics_alone(tmp_path, gateway):
    file = tmp_path / "letters.prom"
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on))
    before = file.read_bytes()
    uri = f"127.0.0.1:{gateway.server_port}"
    refused = MetricsReporter(file=str(file), gateway=uri, on_failure=fail_on)
    refused.event("run_started", run=RUN, job="letters", stages="targets")
    refused.event("run_finished", exit_code=75, seconds=6.0, error="OutputBusy")
    assert file.read_bytes() == before
    assert gateway.received == []


def test_gateway_gets_the_metrics_of_the_job_with_its_password(gateway):
    uri = f"http://me:se%2Fcret@127.0.0.1:{gateway.server_port}"
    a_run(MetricsReporter(file=None, gateway=uri, on_failure=fail_on))
    path, authorization, body = gateway.received[-1]
    assert path == "/metrics/job/softshard/job_name/letters"
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"me:se/cret"
    assert b'softshard_positions_total{job_name="letters"} 200.0' in body


def test_gateway_keeps_the_last_success_while_a_later_run_fails(gateway):
    uri = f"http://127.0.0.1:{gateway.server_port}"
    a_run(MetricsReporter(file=None, gateway=uri, on_failure=fail_on), exit_code=3, error="bad")
    assert gateway.received
    assert not any(b"last_success" in body for _, _, body in gateway.received)


def test_gateway_that_answers_503_or_not_at_all_is_told_once_and_ends_nothing(gateway):
    told = []
    gateway.status = 503
    a_run(
        MetricsReporter(file=None, gateway=f"http://me:secret@127.0.0.1:{gateway.server_port}", on_failure=told.append)
    )
    assert len(told) == 1
    assert "secret" not in told[0]
    a_run(MetricsReporter(file=None, gateway="http://127.0.0.1:9", on_failure=told.append))
    assert len(told) == 2


@pytest.mark.parametrize("file", ["letters.txt", "no-folder/letters.prom"])
def test_metrics_file_that_cannot_be_is_an_argument_that_is_wrong(tmp_path, file):
    with pytest.raises(JobInvalid, match="--metrics-file"):
        MetricsReporter(file=str(tmp_path / file), gateway=None, on_failure=fail_on)


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


def lineage(told):
    return LineageReporter(
        run=RUN,
        job="letters",
        inputs=[dataset_name("s3://me:secret@corpora/letters/")],
        output=("file", "/srv/out/targets"),
        on_failure=told.append,
    )


@pytest.fixture
def lineage_file(tmp_path, monkeypatch):
    """Has the client write events to a file, one a line."""
    for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE_PARENT_ID", "OPENLINEAGE_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(tmp_path / "events.json"))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    return tmp_path / "events.json"


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
    a_run(MetricsReporter(file=str(file), gateway=None, on_failure=fail_on))
    (rules,) = re.findall(r"```yaml\n(groups:.*?)```", page, flags=re.DOTALL)
    expressions = [rule["expr"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]]
    assert len(expressions) == 4
    used = {name for expression in expressions for name in re.findall(r"softshard_\w+", expression)}
    assert used <= {name for name, _ in samples(file)}


def test_log_line_of_the_operation_page_has_the_keys_of_a_real_one(tmp_path):
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/operation.md").read_text(), flags=re.DOTALL)
    log = JsonLog(str(tmp_path / "log.jsonl"), run=RUN, on_failure=fail_on)
    a_run(log, parts=1)
    (part,) = [line for line in lines(tmp_path / "log.jsonl") if line["event"] == "part_committed"]
    assert list(json.loads(shown)) == list(part)
