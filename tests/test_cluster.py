"""Tasks on a real local cluster: what is tried again, what is set aside, what ends the run."""

import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from softshard.config import ClusterSettings
from softshard.errors import DataInvalid, StorageFull
from softshard.jobfile import load_job
from softshard.run.cluster import Cluster, open_cluster, send_message
from softshard.run.job import run_job
from softshard.telemetry import SilentReporter
from test_run import tree


def first_time(marker):
    """True once for each marker, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def task(order):
    what, marker = order
    if what == "dies once" and first_time(marker):
        os._exit(9)
    if what == "fails once" and first_time(marker):
        raise OSError("the network went away")
    if what == "always fails":
        raise OSError("the network is gone")
    if what == "bad data":
        raise DataInvalid("this cannot be right")
    if what == "full":
        raise StorageFull(uri="out")
    if what == "bug":
        raise TypeError("a bug")
    if what == "speaks":
        send_message({"said": "hello"})
    return what.upper()


@pytest.fixture(scope="module")
def cluster():
    with open_cluster(ClusterSettings(workers=2, max_attempts=3)) as running:
        yield running


def run(cluster, tmp_path, *orders):
    results = {}
    failures = cluster.run(
        task,
        [(what, str(tmp_path / f"{index}")) for index, what in enumerate(orders)],
        name=lambda order: f"{Path(order[1]).parent.name}-{Path(order[1]).name}",
        on_result=lambda order, result: results.update({order[0]: result}),
    )
    return results, failures


def test_all_tasks_are_run_whatever_their_number(cluster, tmp_path):
    results, failures = run(cluster, tmp_path, *[f"task {index}" for index in range(40)])
    assert len(results) == 40
    assert failures == {}


def test_lost_worker_and_lost_network_are_tried_again(cluster, tmp_path):
    results, failures = run(cluster, tmp_path, "dies once", "fails once", "fine")
    assert results == {"dies once": "DIES ONCE", "fails once": "FAILS ONCE", "fine": "FINE"}
    assert failures == {}


def test_what_keeps_failing_and_what_is_wrong_are_set_aside_and_the_rest_goes_on(cluster, tmp_path):
    results, failures = run(cluster, tmp_path, "always fails", "bad data", "fine")
    assert results == {"fine": "FINE"}
    assert sorted(failures.values()) == [
        "DataInvalid: this cannot be right (attempt 1)",
        "OSError: the network is gone (attempt 3)",
    ]


@pytest.mark.parametrize(("what", "error"), [("full", StorageFull), ("bug", TypeError)])
def test_full_disk_and_a_bug_end_the_run(cluster, tmp_path, what, error):
    with pytest.raises(error):
        run(cluster, tmp_path, "fine", what)


def test_client_hears_what_tasks_say(cluster, tmp_path):
    heard = []
    cluster.on_message(heard.append)
    run(cluster, tmp_path, "speaks", *["fine"] * 10)
    assert heard == [{"said": "hello"}]


def test_two_jobs_on_one_scheduler_keep_their_results_apart(cluster, tmp_path):
    first, second = (Cluster(cluster._client, ClusterSettings()) for _ in range(2))
    heard = []
    first.on_message(heard.append)
    for running, what in ((first, "speaks"), (second, "fine")):
        results = {}
        running.run(
            task,
            [(what, str(tmp_path / "x"))],
            name=lambda order: "the same name",
            on_result=lambda order, result, results=results: results.update({order[0]: result}),
        )
        assert results == {what: what.upper()}
    assert heard == [{"said": "hello"}]


def test_cluster_that_shrinks_in_the_middle_finishes_its_tasks(tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=3,
        threads_per_worker=1,
        resources={"teacher": 1},
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        local_directory=str(tmp_path / "scratch"),
    ) as elsewhere:
        timer = threading.Timer(2, lambda: elsewhere.scale(1))
        timer.start()
        done = []
        with open_cluster(ClusterSettings(scheduler=elsewhere.scheduler_address)) as shrinking:
            failures = shrinking.run(
                time.sleep,
                [1.0] * 15,
                name=lambda seconds: uuid.uuid4().hex,
                on_result=lambda seconds, result: done.append(seconds),
            )
        timer.join()
    assert failures == {}
    assert len(done) == 15


def test_lost_scheduler_ends_the_run_with_75(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().splitlines()[-1] == "75 the connection to the Dask scheduler is lost", result.stderr


LOST = """
import os, signal, subprocess, sys, threading, time
import dask
from softshard.config import ClusterSettings
from softshard.errors import TryAgain
from softshard.run.cluster import open_cluster

if __name__ == "__main__":
    dask.config.set({"distributed.comm.timeouts.connect": "2s"})
    port = 18700 + os.getpid() % 1000
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
         "--dashboard-address", "127.0.0.1:0"], stderr=subprocess.DEVNULL)
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--no-nanny",
         "--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0", "--resources", "teacher=1",
         "--death-timeout", "20"], stderr=subprocess.DEVNULL)
    threading.Timer(12, lambda: scheduler.send_signal(signal.SIGKILL)).start()
    try:
        with open_cluster(ClusterSettings(scheduler=f"tcp://127.0.0.1:{port}")) as cluster:
            cluster.run(time.sleep, [600], name=lambda task: "long", on_result=lambda task, result: None)
    except TryAgain as error:
        print(error.exit_code, str(error).split(";")[0], flush=True)
    finally:
        scheduler.kill()
        worker.kill()
    os._exit(0)
"""


def test_running_scheduler_gives_the_bytes_of_a_local_cluster(tiny_job, finished, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        resources={"teacher": 1},
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        local_directory=str(tmp_path / "scratch"),
    ) as elsewhere:
        path = tiny_job(tmp_path, cluster={"scheduler": elsewhere.scheduler_address})
        run_job(load_job(path), SilentReporter(), stages=("corpus", "teacher", "targets"))
    of = ("corpus", "teacher", "targets")
    assert tree(tmp_path / "out", of=of) == tree(finished, of=of)
