"""Clusters: a local one whose workers are lost while it starts, and one that is running, by address or by file."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import dask
import psutil
import pytest
from distributed.nanny import WorkerProcess
from pydantic import ValidationError

from fakes.events import Listener
from fakes.outputs import wait_for
from fakes.tasks import run_orders
from softshard.cluster import cluster as cluster_module
from softshard.cluster.cluster import open_cluster
from softshard.config import ClusterSettings
from softshard.errors import TryAgain


def test_adaptive_cluster_grows_for_the_work_and_shrinks_after_it(tmp_path):
    with open_cluster(ClusterSettings(adaptive={"minimum": 1, "maximum": 2})) as adaptive:
        most = []
        _, failures = run_orders(
            adaptive,
            tmp_path,
            *["sleeps"] * 14,
            heard=type("", (), {"append": lambda _: most.append(workers_of(adaptive))}),
        )
        assert failures == {}
        assert max(most) == 2
        deadline = time.monotonic() + 60
        while workers_of(adaptive) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert workers_of(adaptive) == 1


def test_a_killed_worker_that_takes_long_to_end_fails_no_run(tmp_path, monkeypatch):
    kill = WorkerProcess.kill

    async def slow(process, **options):
        await kill(process, **options)
        raise TimeoutError

    monkeypatch.setattr(WorkerProcess, "kill", slow)
    with open_cluster(ClusterSettings(workers=2)) as local:
        results, failures = run_orders(local, tmp_path, *["works"] * 3)
        ended = local.client.cluster
    assert (results, failures) == ({"works": "WORKS"}, {})
    assert ended.status.name == "closed"


def workers_of(cluster):
    return len(cluster.addresses())


def test_scheduler_file_that_comes_later_is_waited_for(cluster, tmp_path):
    file = tmp_path / "scheduler.json"
    address = cluster.client.scheduler.address

    def write():
        file.write_text('{"addr')
        time.sleep(0.5)
        file.write_text(json.dumps({"address": address}))

    writer = threading.Timer(0.5, write)
    writer.start()
    with open_cluster(ClusterSettings(scheduler_file=str(file))) as other:
        results, _ = run_orders(other, tmp_path, "fine")
    writer.join()
    assert results == {"fine": "FINE"}


def test_scheduler_file_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "_SECONDS_FOR_THE_FILE", 0.5)
    absent = open_cluster(ClusterSettings(scheduler_file=str(tmp_path / "none.json")))
    with pytest.raises(TryAgain, match=r"none\.json: no Dask scheduler has written its address"), absent:
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "tcp://a:1", "scheduler_file": "b"},
        {"scheduler": "tcp://a:1", "adaptive": {"maximum": 2}},
        {"adaptive": {"minimum": 3, "maximum": 2}},
    ],
)
def test_settings_of_two_clusters_at_once_are_refused(settings):
    with pytest.raises(ValidationError, match=r"exclude each other|must be at most"):
        ClusterSettings(**settings)


def test_a_local_cluster_offers_a_dashboard_only_where_it_has_one(cluster, listener):
    has_bokeh = importlib.util.find_spec("bokeh") is not None
    dashboard = f"; dashboard: {cluster.client.dashboard_link}" if has_bokeh else ""
    assert listener.said[0] == f"cluster: 2 local worker(s){dashboard}"


def test_the_dashboard_is_named(cluster):
    other = Listener()
    with open_cluster(ClusterSettings(scheduler=cluster.client.scheduler.address), other):
        pass
    (line,) = other.said
    address = line.partition("dashboard: ")[2]
    assert address == cluster.client.dashboard_link
    # The scheduler's own page of its health lies beside the dashboard, which needs bokeh.
    with urllib.request.urlopen(address.replace("/status", "/health")) as answer:
        assert answer.read() == b"ok"


def test_lost_scheduler_ends_the_run_with_75(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    command = [sys.executable, str(script), str(tmp_path / "begun")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.stdout.strip().splitlines()[-1] == "75 the connection to the Dask scheduler is lost", result.stderr


LOST = """
import os, subprocess, sys, threading, time
from pathlib import Path
import dask
from softshard.config import ClusterSettings
from softshard.errors import TryAgain
from softshard.cluster.cluster import open_cluster

def begin(marker):
    Path(marker).touch()
    time.sleep(600)

def kill_when_begun(scheduler, marker):
    while not Path(marker).exists():
        time.sleep(0.1)
    scheduler.kill()

if __name__ == "__main__":
    marker = sys.argv[1]
    dask.config.set({"distributed.comm.timeouts.connect": "2s"})
    file = str(Path(marker).with_name("scheduler.json"))
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
         "--scheduler-file", file, "--dashboard-address", "127.0.0.1:0"], stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", file, "--no-nanny",
         "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--resources", "teacher=1",
         "--death-timeout", "60"], stderr=subprocess.DEVNULL, cwd=os.path.dirname(__file__))
    threading.Thread(target=kill_when_begun, args=(scheduler, marker), daemon=True).start()
    try:
        with open_cluster(ClusterSettings(scheduler_file=file)) as cluster:
            cluster.map_tasks(begin, [marker], name=lambda task: "long", on_result=print)
    except TryAgain as error:
        print(error.exit_code, str(error).split(";")[0], flush=True)
    finally:
        scheduler.kill()
        worker.kill()
    os._exit(0)
"""


@contextmanager
def workers_killed_as_they_come(most):
    """Kill the first processes that this one starts for a cluster, from a thread."""
    over, killed = threading.Event(), []

    def watch():
        while not over.is_set() and len(killed) < most:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.pid in killed or len(killed) == most:
                        continue
                    if "multiprocessing.spawn" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def test_worker_that_is_killed_while_it_starts_is_started_again():
    with workers_killed_as_they_come(most=1) as killed, open_cluster(ClusterSettings(workers=2)) as cluster:
        assert len(killed) == 1
        assert len(cluster.addresses()) == 2


def test_workers_that_never_come_up_are_a_reason_to_try_again_later():
    with (
        workers_killed_as_they_come(most=1_000),
        pytest.raises(TryAgain, match="a worker ended before it was ready, 3 times"),
        open_cluster(ClusterSettings(workers=1)),
    ):
        pass


@pytest.mark.parametrize("adaptive", [None, {"minimum": 1, "maximum": 1}])
def test_worker_that_dask_has_given_up_is_started_anew(adaptive):
    """One that is not there some time after it was lost, be it that its successor has died too, Dask takes away."""
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}),
        open_cluster(ClusterSettings(workers=1, adaptive=adaptive)) as cluster,
    ):
        with workers_killed_as_they_come(most=1_000):
            wait_for(lambda: not cluster.client.cluster.workers)
        done = []
        failures = cluster.map_tasks(abs, [-1, -2], name=str, on_result=lambda task, result, _: done.append(result))
        assert failures == {}
        assert sorted(done) == [1, 2]
