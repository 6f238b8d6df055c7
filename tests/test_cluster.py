"""Tasks on a real local cluster: what is tried again, what is set aside, what ends the run."""

import os
from pathlib import Path

import pytest

from softshard.config import ClusterSettings, load_job
from softshard.errors import DataInvalid, StorageFull
from softshard.run.cluster import open_cluster, send_message
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
