"""Credentials are taken out of everything that a run tells."""

from __future__ import annotations

import pytest

from fakes.events import RUN, fail_on
from softshard.telemetry import FanOut, SilentReporter
from softshard.telemetry.log import JsonLog
from softshard.telemetry.redaction import without_credentials


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
