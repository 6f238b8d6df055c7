"""Two runs on one output: one goes on, the other is refused by name; what is dead is taken over, what was only stopped
ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.errors import LeaseLost, OutputBusy
from softshard.output import lease as leases
from softshard.output.lease import Pace, hold_lease
from softshard.stages.job import run_job
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter

FAST = Pace(interval_seconds=0.05, expiry_seconds=0.6)

HOLDER = """
import signal, sys, time
from softshard.errors import LeaseLost
from softshard.output.lease import Pace, hold_lease
from softshard.storage import LocalStore
pace = Pace(interval_seconds=0.05, expiry_seconds=5)
def stop(number, frame):
    raise KeyboardInterrupt
if sys.argv[2] == "in the background":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
try:
    with hold_lease(LocalStore(sys.argv[1]), job="tales", run="first", pace=pace):
        print("held", flush=True)
        time.sleep(60)
except LeaseLost as error:
    print(error.exit_code, error, flush=True)
"""


def holder(folder, *, where="at a terminal"):
    """A process that holds the lease of a folder for a minute."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), where], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def lease_files(folder):
    return sorted(file.name for file in (folder / ".lease").glob("*"))


def a_lease(folder, **changes):
    """A lease that nobody renews, as a run on another machine leaves when that machine dies."""
    with hold_lease(LocalStore(folder), job="tales", run="dead", pace=FAST):
        content = json.loads((folder / ".lease/000001.json").read_text())
    content |= {"kernel": "another boot", "host": "elsewhere"} | changes
    (folder / ".lease/000001.json").write_text(json.dumps(content))


def test_lease_is_there_while_it_is_held_and_gone_after_it(tmp_path):
    with hold_lease(LocalStore(tmp_path), job="tales", run="one", pace=FAST) as lease:
        assert lease_files(tmp_path) == ["000001.json"]
        lease.check()
    assert lease_files(tmp_path) == []
    with hold_lease(LocalStore(tmp_path), job="tales", run="two", pace=FAST):
        assert lease_files(tmp_path) == ["000001.json"]


def test_second_run_is_refused_with_the_first_ones_identity(tmp_path):
    first = holder(tmp_path)
    try:
        with pytest.raises(OutputBusy) as refused, hold_lease(LocalStore(tmp_path), job="x", run="y", pace=FAST):
            pass
    finally:
        first.kill()
        first.wait()
    assert refused.value.exit_code == 75
    assert f"run first of job 'tales' on {os.uname().nodename}, process {first.pid}, since 20" in str(refused.value)


def test_lease_of_a_killed_process_is_taken_over_at_once(tmp_path):
    """Even while its parent has not yet asked how it ended, and whatever the expiry."""
    first = holder(tmp_path)
    first.kill()
    while "Z" not in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    started = time.monotonic()
    with hold_lease(LocalStore(tmp_path), job="x", run="y", pace=Pace(interval_seconds=1, expiry_seconds=100)):
        assert time.monotonic() - started < 5
        assert lease_files(tmp_path) == ["000001.json", "000002.json"]
    first.wait()
    assert lease_files(tmp_path) == []


def test_process_id_that_is_used_again_is_not_taken_for_the_holder(tmp_path):
    a_lease(tmp_path, kernel=leases._kernel(), pid=os.getpid(), process_start="1")
    with hold_lease(LocalStore(tmp_path), job="x", run="y", pace=Pace(interval_seconds=1, expiry_seconds=100)):
        assert lease_files(tmp_path) == ["000001.json", "000002.json"]


def test_process_of_another_container_is_not_looked_for_among_ours(tmp_path):
    """One boot, another namespace of process ids: the number means another process, and the lease has to expire."""
    boot = leases._kernel().split()[0]
    a_lease(tmp_path, kernel=f"{boot} pid:[1]", pid=2**22 - 1)
    started = time.monotonic()
    with hold_lease(LocalStore(tmp_path), job="x", run="y", pace=FAST):
        assert time.monotonic() - started >= FAST.expiry_seconds


@pytest.mark.parametrize("content", [None, b"", b'{"run": 1}', b"\xff\x00"])
def test_lease_that_nobody_renews_expires_even_a_damaged_one(tmp_path, content):
    a_lease(tmp_path)
    if content is not None:
        (tmp_path / ".lease/000001.json").write_bytes(content)
    started = time.monotonic()
    with hold_lease(LocalStore(tmp_path), job="x", run="y", pace=FAST):
        assert time.monotonic() - started >= FAST.expiry_seconds
    assert lease_files(tmp_path) == []


def test_clock_that_jumps_neither_ends_nor_extends_a_lease(tmp_path, monkeypatch):
    first = holder(tmp_path)
    try:
        for jump in (10**9, -(10**9)):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
            with pytest.raises(OutputBusy), hold_lease(LocalStore(tmp_path), job="x", run="y", pace=FAST):
                pass
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("where", ["at a terminal", "in the background"])
def test_stopped_run_whose_lease_was_taken_over_ends_when_it_wakes(tmp_path, where):
    """A shell's background jobs ignore SIGINT, by which a run at a terminal is interrupted."""
    first = holder(tmp_path, where=where)
    first.send_signal(signal.SIGSTOP)
    try:
        with hold_lease(LocalStore(tmp_path), job="tales", run="second", pace=FAST):
            first.send_signal(signal.SIGCONT)
            said, _ = first.communicate(timeout=20)
            assert said.startswith(f"75 {tmp_path}: this run was suspended")
            assert "run second of job 'tales'" in said
            assert lease_files(tmp_path) == ["000001.json", "000002.json"]
    finally:
        first.kill()
        first.wait()
    assert lease_files(tmp_path) == []


def test_stopped_run_whose_successor_has_come_and_gone_ends_too(tmp_path):
    first = holder(tmp_path)
    first.send_signal(signal.SIGSTOP)
    try:
        with hold_lease(LocalStore(tmp_path), job="tales", run="second", pace=FAST):
            pass
        first.send_signal(signal.SIGCONT)
        said, _ = first.communicate(timeout=20)
    finally:
        first.kill()
        first.wait()
    assert said.startswith("75 ")
    assert "another run has taken over" in said
    assert lease_files(tmp_path) == []


def test_lost_lease_is_seen_by_check_in_any_thread(tmp_path):
    seen = []

    def work():
        with hold_lease(LocalStore(tmp_path), job="tales", run="one", pace=FAST) as lease:
            (tmp_path / ".lease/000002.json").write_text("{}")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not seen:
                try:
                    lease.check()
                except LeaseLost as error:
                    seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1


def test_of_many_that_start_at_once_one_holds(tmp_path):
    """Eight threads, each of which would go on only alone."""
    inside, most, refused = [], [], []

    def work(number):
        try:
            with hold_lease(LocalStore(tmp_path), job="tales", run=str(number), pace=FAST):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.5)
                inside.remove(number)
        except OutputBusy as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 8
    assert len(refused) >= 6


def test_storage_that_fails_for_a_while_does_not_lose_the_lease(tmp_path):
    class Shaky(LocalStore):
        failing = False

        def replace(self, path, content):
            if self.failing:
                raise OSError("503 slow down")
            super().replace(path, content)

    store = Shaky(tmp_path)
    with hold_lease(store, job="tales", run="one", pace=FAST) as lease:
        store.failing = True
        time.sleep(0.3)
        store.failing = False
        before = (tmp_path / ".lease/000001.json").read_bytes()
        time.sleep(0.3)
        assert (tmp_path / ".lease/000001.json").read_bytes() != before
        lease.check()


def test_run_beside_a_run_is_75_and_changes_nothing(tiny_job, tmp_path, capsys):
    path = tiny_job(tmp_path)
    (tmp_path / "out").mkdir()
    first = holder(tmp_path / "out")
    try:
        assert main(["run", str(path), "--quiet"]) == 75
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"process {first.pid}" in line
        assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [".lease", ".tmp"]
    finally:
        first.kill()
        first.wait()
    run_job(load_job(path), SilentReporter(), stages=("corpus",))
    assert (tmp_path / "out/corpus/manifest.json").exists()
    assert lease_files(tmp_path / "out") == []


def test_folder_that_another_job_has_claimed_meanwhile_is_refused(tiny_job, tmp_path, monkeypatch):
    """Between the look at an empty folder and the lease, another job came and went."""
    from softshard.errors import OutputForeign
    from softshard.stages import job as jobs

    path = tiny_job(tmp_path)
    real = jobs.hold_lease

    def late(store, **values):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/job.yaml").write_text("name: another\n")
        return real(store, **values)

    monkeypatch.setattr(jobs, "hold_lease", late)
    with pytest.raises(OutputForeign, match="belongs to job 'another'"):
        run_job(load_job(path), SilentReporter(), stages=("corpus",))
    assert (tmp_path / "out/job.yaml").read_text() == "name: another\n"
