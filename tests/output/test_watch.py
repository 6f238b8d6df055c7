"""`softshard status --watch`: what a run's output says of it, from any machine, while it goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pexpect
import pyte
import pytest

from fakes.s3_server import moto, proxy, spoiled_server  # noqa: F401
from softshard.cli import main
from softshard.cli.watch import render_line
from softshard.corpus.manifest import (
    CORPUS_VERSION,
    CorpusManifest,
    CorpusSlice,
    read_corpus_manifest,
    write_corpus_manifest,
)
from softshard.output.lease import Pace, hold_lease
from softshard.output.watch import Watcher
from softshard.records.canonical import canonical_json
from softshard.shard.manifest import Manifest, Receipt, read_receipt, write_manifest
from softshard.shard.schema import SCHEMA_VERSION, Fidelity
from softshard.storage import open_store

LABELS = 1000
FIDELITY = Fidelity(
    mean_squared_error=0.01,
    gradient_angle_degrees=5.0,
    mean_kl_nats=None,
    mean_entries=12.0,
    mass_by_rank=None,
    num_ranked=0,
)


class Output:
    """An output as a run leaves it bit by bit; a part's id is its teacher and its number."""

    def __init__(self, out, *, slices):
        self.store = open_store(out)
        self.store.put_once("job.yaml", b"name: letters\n")
        self.grow(slices)

    def grow(self, slices):
        self.corpus = CorpusManifest(
            schema_version=CORPUS_VERSION,
            key=str(slices),
            tokenizer_fingerprint="t",
            vocab_size=300,
            context_tokens=512,
            overlap_tokens=64,
            folds=0,
            seed=0,
            sources=(),
            counts={},
            train_digests=(),
            slices=tuple(self.slice(number) for number in range(slices)),
            documents=(),
            statistics=(),
        )
        write_corpus_manifest(self.store.below("corpus"), self.corpus)

    def slice(self, number):
        path = f"sequences/train-all-{number:05d}.parquet"
        counts = {"num_documents": 1, "num_sequences": 10, "num_tokens": LABELS + 1, "num_bytes_text": 4000}
        return CorpusSlice(
            path=path, split="train", fold=-1, sha256=f"{number:064x}", num_labels=LABELS + number, **counts
        )

    def receipt(self, number, teacher="a"):
        return Receipt(
            part_id=f"{teacher}{number:031x}",
            path=f"data/train/part-{number:05d}-{teacher}.parquet",
            split="train",
            fold=-1,
            slice=f"{number:064x}",
            sha256="0" * 64,
            num_bytes=9000,
            num_sequences=10,
            num_labels=LABELS + number,
            num_head_entries=1,
            num_tail_entries=1,
            label_logprob_sum=-1.0,
            fidelity=FIDELITY,
        )

    def commit(self, *numbers, teacher="a"):
        for number in numbers:
            receipt = self.receipt(number, teacher)
            self.store.put_once(f"targets/receipts/{receipt.part_id}.json", canonical_json(receipt))

    def finish(self, teacher="a"):
        parts = tuple(self.receipt(number, teacher) for number in range(len(self.corpus.slices)))
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            job="letters",
            corpus=self.corpus.digest,
            sources=(),
            tokenizer_fingerprint="t",
            vocab_size=300,
            context_tokens=512,
            overlap_tokens=64,
            target={},
            seed=0,
            teacher={"adapter": teacher},
            fidelity=None,
            bytes_per_position=9.0,
            parts=parts,
        )
        write_manifest(self.store.below("targets"), manifest)


@pytest.fixture
def output(tmp_path):
    return Output(tmp_path / "out", slices=4)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_parts_and_positions_are_counted_of_the_corpus(output):
    output.commit(0, 2)
    status = Watcher(output.store).look()
    assert (status.parts, status.parts_total) == (2, 4)
    assert (status.positions, status.positions_total) == (2002, 4006)
    assert status.bytes == 18000
    assert not status.complete
    assert status.positions_per_second is None


def test_rate_and_remaining_time_are_those_of_the_watch(output):
    clock = Clock()
    output.commit(0)
    watcher = Watcher(output.store, clock=clock)
    watcher.look()
    clock.now += 10
    output.commit(1)
    status = watcher.look()
    assert status.positions_per_second == pytest.approx(100.1)
    assert status.eta_seconds == pytest.approx((1002 + 1003) / 100.1)
    assert status.last_parts == ("data/train/part-00001-a.parquet",)


def test_receipts_and_the_corpus_are_read_once(output, monkeypatch):
    read = []

    def counted(function):
        def call(store, *path):
            read.append(path or function.__name__)
            return function(store, *path)

        return call

    for function in (read_receipt, read_corpus_manifest):
        monkeypatch.setattr(f"softshard.output.watch.{function.__name__}", counted(function))
    output.commit(0, 1)
    watcher = Watcher(output.store)
    for _ in range(3):
        watcher.look()
    output.commit(2)
    watcher.look()
    assert len(read) == len(set(read)) == 4


def test_run_in_a_bucket_is_watched_from_any_machine_and_each_receipt_is_got_once(proxy):  # noqa: F811
    output = Output("s3://box/watched", slices=4)
    output.commit(0, 1, 2)
    watcher = Watcher(open_store("s3://box/watched"))
    assert watcher.look().parts == 3
    output.commit(3)
    output.finish()
    proxy.seen.clear()
    status = watcher.look()
    assert status.complete
    assert (status.parts, status.positions) == (4, 4006)
    got = [request.path for request in proxy.seen if request.is_for("GET", having="receipts/a")]
    assert [path.split("?")[0] for path in got] == [f"/box/watched/targets/receipts/a{3:031x}.json"]


def test_it_is_complete_with_the_manifest_and_not_before(output):
    watcher = Watcher(output.store)
    output.commit(0, 1, 2, 3)
    assert not watcher.look().complete
    output.finish()
    status = watcher.look()
    assert status.complete
    assert status.parts == 4


def test_it_is_not_complete_while_a_run_is_at_work(output):
    output.commit(0, 1, 2, 3)
    output.finish()
    watcher = Watcher(output.store)
    with hold_lease(output.store, job="letters", run="the-run"):
        status = watcher.look()
        assert not status.complete
        assert status.targets_complete
        assert status.run.run == "the-run"
        assert status.run.pid == os.getpid()
    status = watcher.look()
    assert status.complete
    assert status.run is None


def test_run_whose_lease_is_not_renewed_is_silent(output):
    clock = Clock()
    lease = {"run": "r", "job": "letters", "host": "gpu-7", "pid": 7, "started": "", "kernel": None}
    lease = {**lease, "process_start": None, "token": "t"}
    watcher = Watcher(output.store, clock=clock)

    def beat(number):
        output.store.replace(".lease/000001.json", json.dumps({**lease, "beat": number}).encode())

    beat(1)
    assert watcher.look().run.is_alive
    clock.now += Pace().expiry_seconds - 1
    beat(2)
    assert watcher.look().run.silent_seconds == 0
    clock.now += Pace().expiry_seconds + 1
    status = watcher.look()
    assert not status.run.is_alive
    assert render_line(status).endswith("r on gpu-7, process 7, silent for 0:01:01")


def test_parts_of_new_documents_are_what_is_missing(output):
    output.commit(0, 1, 2, 3)
    output.finish()
    output.grow(6)
    watcher = Watcher(output.store)
    status = watcher.look()
    assert (status.parts, status.parts_total, status.complete) == (4, 6, False)
    output.commit(4)
    assert watcher.look().parts == 5


def test_parts_of_another_teacher_stop_counting_once_a_new_one_is_there(output):
    output.commit(0, 1, 2, 3)
    output.finish()
    output.grow(5)
    watcher = Watcher(output.store)
    assert watcher.look().parts == 4
    output.commit(0, teacher="b")
    assert watcher.look().parts == 1
    output.commit(1, 2, 3, 4, teacher="b")
    output.finish(teacher="b")
    assert watcher.look().complete


def test_parts_left_by_a_run_with_other_settings_do_not_hide_that_a_later_one_is_complete(output):
    output.commit(0, teacher="b")
    output.commit(0, 1, 2, 3)
    output.finish()
    status = Watcher(output.store).look()
    assert status.complete
    assert status.parts == 4


def test_corpus_that_is_not_complete_has_no_total(tmp_path):
    store = open_store(tmp_path)
    store.put_once("job.yaml", b"name: letters\n")
    status = Watcher(store).look()
    assert status.parts_total is None
    assert status.eta_seconds is None
    assert "0 parts, 0 positions" in render_line(status)


def test_damaged_receipt_is_named_and_3(output, capsys):
    output.store.put_once("targets/receipts/x.json", b"{")
    assert main(["status", output.store.uri, "--watch"]) == 3
    assert "receipts/x.json" in capsys.readouterr().err


def test_folder_without_a_job_is_2(tmp_path, capsys):
    assert main(["status", str(tmp_path), "--watch"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_watch_ends_with_0_when_the_run_is_complete(finished, capsys):
    assert main(["status", str(finished), "--watch"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("(100.0%), " + line.split("(100.0%), ")[1].split(", complete")[0] + ", complete")
    assert main(["status", str(finished), "--watch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]


def test_stopped_watch_is_75_and_leaves_nothing_on_stderr(output):
    command = [sys.executable, "-m", "softshard.cli", "status", output.store.uri, "--watch", "--every", "0.1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (first["parts"], first["parts_total"]) == (0, 4)
    assert process.returncode == 75
    assert errors == ""


def test_terminal_of_80_columns_shows_a_picture_that_is_redrawn(output):
    output.commit(0)
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)
    command = ["-m", "softshard.cli", "status", output.store.uri, "--watch", "--every", "0.2"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    child = pexpect.spawn(sys.executable, command, dimensions=(24, 80), env=environment)

    def until(text):
        deadline = time.monotonic() + 20
        while text not in "\n".join(screen.display):
            assert time.monotonic() < deadline, "\n".join(screen.display)
            try:
                stream.feed(child.read_nonblocking(65536, timeout=0.2))
            except (pexpect.TIMEOUT, pexpect.EOF):
                continue

    until("1/4 parts")
    output.commit(1, 2, 3)
    output.finish()
    until("complete")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    shown = "\n".join(screen.display)
    assert "4/4 parts (100.0%)" in shown
    assert shown.count("targets") == 1, "the picture was redrawn in its place"
