"""Metrics in Prometheus' text format, in a file and at a push gateway."""

from __future__ import annotations

import base64
import http.server
import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.events import RUN, a_run, fail_on, samples
from softshard.errors import JobInvalid
from softshard.telemetry.metrics import MetricsReporter, RunMetrics

ROOT = Path(__file__).parents[2]


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
