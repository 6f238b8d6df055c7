"""Being asked to stop: the tasks in hand are finished or dropped, nothing else is started, nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fakes.outputs import times, wait_for
from softshard.config.job_file import load_job
from softshard.stages.job import run_job
from softshard.telemetry import SilentReporter

STOPPED = """
import signal, sys, time
from pathlib import Path
from softshard.config import ClusterSettings
from softshard.errors import Stopped
from softshard.cluster.cluster import open_cluster

def interrupt(number, frame):
    raise KeyboardInterrupt

def begin(order):
    seconds, marker = order
    Path(marker).touch()
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    folder, seconds, grace = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGTERM, interrupt)
    results = []
    try:
        with open_cluster(ClusterSettings(workers=2, grace_seconds=grace)) as cluster:
            cluster.map_tasks(
                begin, ((seconds, str(folder / f"begun-{i}")) for i in range(100)),
                name=lambda order: "part", on_result=lambda order, result, execution: results.append(result))
    except Stopped as error:
        print(error.exit_code, error.signal, error.finished, error.dropped, len(results), flush=True)
    except KeyboardInterrupt:
        print("at once", flush=True)
"""


class Stoppable:
    """A process in a session of its own, so that a signal can go to all that it has started, and to nobody else."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def send(self, number):
        os.killpg(self.process.pid, number)

    def end(self):
        out, err = self.process.communicate(timeout=120)
        return out.strip().splitlines(), err.strip().splitlines()

    def left(self):
        """Processes of the session that are alive; waits a little for them to end."""
        deadline = time.monotonic() + 20
        while (alive := list(self._alive())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _alive(self):
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    yield process.pid
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue


def begun_in(folder):
    return len(list(folder.glob("begun-*")))


@pytest.fixture
def stopped(tmp_path):
    """Starts two workers on tasks of some seconds; ready when both have begun one."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    started = []

    def start(seconds, grace):
        started.append(Stoppable(script, tmp_path, seconds, grace))
        wait_for(lambda: begun_in(tmp_path) >= 2)
        return started[0]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.send(signal.SIGKILL)
            one.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_all_processes_lets_the_tasks_in_hand_finish_and_starts_no_other(stopped, tmp_path, number):
    running = stopped(3, grace=60)
    running.send(number)
    (line,), _ = running.end()
    finished = int(line.split()[2])
    assert line.split()[:2] == ["75", number.name]
    assert line.split()[3] == "0"
    assert 1 <= finished <= 2
    assert int(line.split()[4]) == begun_in(tmp_path)
    assert running.left() == []


def test_tasks_that_outlast_the_grace_are_dropped(stopped):
    running = stopped(600, grace=0.5)
    running.send(signal.SIGTERM)
    assert running.end()[0] == ["75 SIGTERM 0 2 0"]
    assert running.left() == []


def test_second_signal_ends_at_once(stopped):
    running = stopped(600, grace=600)
    running.send(signal.SIGTERM)
    time.sleep(1)
    running.send(signal.SIGTERM)
    assert running.end()[0] == ["at once"]
    assert running.left() == []


def test_workers_do_not_outlive_a_client_that_is_killed(stopped):
    running = stopped(600, grace=600)
    running.process.kill()
    running.process.wait()
    assert running.left() == []


@pytest.mark.slow
def test_a_stopped_job_ends_with_75_and_goes_on_from_there(tiny_job, tmp_path):
    """As a service manager stops it: the signal reaches the command and all of its workers."""
    path = tiny_job(tmp_path, teacher={"folds": 0}, corpus={"sequences_per_part": 6}, cluster={"grace_seconds": 60})
    targets, receipts = tmp_path / "out/targets", tmp_path / "out/targets/receipts"
    run_job(load_job(path), SilentReporter(), stages=("corpus", "teacher"))
    command = Stoppable("-m", "softshard.cli", "targets", path)
    try:
        wait_for(lambda: receipts.is_dir() and len(list(receipts.iterdir())) >= 3)
        command.send(signal.SIGTERM)
        out, errors = command.end()
    finally:
        if command.process.poll() is None:
            command.send(signal.SIGKILL)
    assert command.process.returncode == 75, errors
    assert command.left() == []
    assert out == []
    assert errors[-1].startswith("softshard: stopped by SIGTERM: ")
    assert " running tasks finished, 0 dropped;" in errors[-1]
    assert not (targets / "manifest.json").exists()
    parts = [targets / json.loads(receipt.read_bytes())["path"] for receipt in receipts.iterdir()]
    assert all(part.is_file() for part in parts)
    assert len(list((targets / "data").rglob("*.parquet"))) == len(parts)
    before = times(targets / "data")
    outcome = run_job(load_job(path), SilentReporter(), stages=("targets",))
    assert len(outcome.manifest.parts) > len(parts)
    assert {name: when for name, when in times(targets / "data").items() if name in before} == before
