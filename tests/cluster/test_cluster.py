"""Tasks on a real local cluster: what is tried again, what is set aside, what ends the run."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

import dask
import psutil
import pytest
from distributed import LocalCluster, get_worker
from pydantic import ValidationError

from fakes.outputs import tree, wait_for
from softshard.cluster import cluster as cluster_module
from softshard.cluster import task_queue as flight_module
from softshard.cluster.cluster import Cluster, open_cluster
from softshard.cluster.retry import retry_delay_seconds
from softshard.cluster.worker import send_message
from softshard.config import ClusterSettings
from softshard.config.job_file import load_job
from softshard.errors import DataInvalid, PartsFailed, StorageFull, TryAgain
from softshard.stages.job import run_job
from softshard.telemetry import SilentReporter


def first_time(marker):
    """True once for each marker, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def task(order):
    what, marker = order
    if what == "fails where it began":
        began = Path(marker)
        here = get_worker().address
        if not began.exists():
            began.write_text(here)
            raise OSError("the network went away")
        return began.read_text(), here
    if what == "always dies":
        os._exit(9)
    if what == "sleeps":
        time.sleep(1)
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
    with open_cluster(ClusterSettings(workers=2, max_attempts=3, retry_seconds=0.1)) as running:
        yield running


def run(cluster, tmp_path, *orders, heard=None, **told):
    results = {}

    def on_result(order, result, execution):
        results[order[0]] = result
        if heard is not None:
            heard.append(order[0])

    failures = cluster.map_tasks(
        task,
        [(what, str(tmp_path / f"{index}")) for index, what in enumerate(orders)],
        name=lambda order: f"{Path(order[1]).parent.name}-{Path(order[1]).name}",
        on_result=on_result,
        **told,
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


def test_a_failed_task_is_tried_again_on_another_worker(cluster, tmp_path):
    wait_for(lambda: workers_of(cluster) == 2)
    results, _ = run(cluster, tmp_path, "fails where it began")
    first, second = results["fails where it began"]
    assert first != second


def test_each_failure_is_told_with_its_attempt_and_reason(cluster, tmp_path):
    told = []
    run(
        cluster,
        tmp_path,
        "always fails",
        "bad data",
        on_retry=lambda order, attempt, reason: told.append(("again", order[0], attempt, reason.split(":")[0])),
        on_set_aside=lambda order, attempt, reason: told.append(("aside", order[0], attempt, reason.split(":")[0])),
    )
    assert sorted(told) == [
        ("again", "always fails", 1, "OSError"),
        ("again", "always fails", 2, "OSError"),
        ("aside", "always fails", 3, "OSError"),
        ("aside", "bad data", 1, "DataInvalid"),
    ]


def test_tasks_that_waited_on_a_lost_worker_are_not_blamed_for_it(tmp_path):
    """With one attempt, whoever is blamed is set aside; with one worker, all wait behind the one that kills it."""
    with open_cluster(ClusterSettings(workers=1, max_attempts=1)) as alone:
        results, failures = run(alone, tmp_path, "always dies", *[f"task {index}" for index in range(7)])
    assert len(results) == 7
    (reason,) = failures.values()
    assert reason.startswith("KilledWorker: its worker tcp://")


def test_tasks_are_taken_as_there_is_room_for_them(cluster, tmp_path):
    taken, finished, ahead = 0, 0, []

    def orders():
        nonlocal taken
        for index in range(300):
            taken += 1
            ahead.append(taken - finished)
            yield f"task {index}", str(tmp_path / f"{index}")

    def on_result(order, result, execution):
        nonlocal finished
        finished += 1

    cluster.map_tasks(task, orders(), name=lambda order: f"streamed-{order[0]}", on_result=on_result)
    assert finished == 300
    assert max(ahead) <= 2 * 2 * 16


def test_results_come_in_the_order_of_the_tasks_and_few_are_taken_ahead(cluster, tmp_path):
    """The first one takes a second, in which the others could all be done."""
    taken = []

    def orders():
        for index in range(300):
            taken.append(index)
            yield ("sleeps" if index == 0 else f"task {index}", str(tmp_path / f"{index}"))

    results = cluster.map_in_order(task, orders(), name="ordered", out="here")
    assert next(results) == "SLEEPS"
    assert len(taken) <= 32 + 2 * 2 * 16
    assert list(results) == [f"TASK {index}" for index in range(1, 300)]


def test_an_ordered_stream_ends_with_the_first_task_that_is_set_aside(cluster, tmp_path):
    orders = [(what, str(tmp_path / str(index))) for index, what in enumerate(["fine", "bad data", "fine"] * 5)]
    results = cluster.map_in_order(task, orders, name=tmp_path.name, out="the corpus")
    with pytest.raises(PartsFailed, match=r"the corpus: .*-1: DataInvalid: this cannot be right"):
        list(results)


def test_pauses_double_differ_and_end_at_a_minute():
    pauses = [
        [retry_delay_seconds(f"part {index}", number, base=2.0) for index in range(50)] for number in (1, 2, 3, 9)
    ]
    for found, longest in zip(pauses, (2.0, 4.0, 8.0, 60.0), strict=True):
        assert longest / 2 <= min(found) < max(found) <= longest
        assert len(set(found)) == 50
    assert retry_delay_seconds("part 7", 2, base=2.0) == pauses[1][7]


def test_paused_tasks_let_others_pass(tmp_path):
    with open_cluster(ClusterSettings(workers=1, retry_seconds=4.0)) as alone:
        order = []
        run(alone, tmp_path, "fails once", "fine", "task", heard=order)
    assert order == ["fine", "task", "fails once"]


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
    first, second = (Cluster(cluster.client, ClusterSettings()) for _ in range(2))
    heard = []
    first.on_message(heard.append)
    for running, what in ((first, "speaks"), (second, "fine")):
        results = {}
        running.map_tasks(
            task,
            [(what, str(tmp_path / "x"))],
            name=lambda order: "the same name",
            on_result=lambda order, result, execution, results=results: results.update({order[0]: result}),
        )
        assert results == {what: what.upper()}
    assert heard == [{"said": "hello"}]


def test_adaptive_cluster_grows_for_the_work_and_shrinks_after_it(tmp_path):
    with open_cluster(ClusterSettings(adaptive={"minimum": 1, "maximum": 2})) as adaptive:
        most = []
        _, failures = run(
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
        results, _ = run(other, tmp_path, "fine")
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


class Listener(SilentReporter):
    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


def test_the_dashboard_is_named(cluster):
    listener = Listener()
    with open_cluster(ClusterSettings(scheduler=cluster.client.scheduler.address), listener):
        pass
    (line,) = listener.said
    address = line.partition("dashboard: ")[2]
    assert address == cluster.client.dashboard_link
    # The scheduler's own page of its health lies beside the dashboard, which needs bokeh.
    with urllib.request.urlopen(address.replace("/status", "/health")) as answer:
        assert answer.read() == b"ok"


def test_cluster_that_shrinks_in_the_middle_finishes_its_tasks(tmp_path):
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
            failures = shrinking.map_tasks(
                time.sleep,
                [1.0] * 15,
                name=lambda seconds: uuid.uuid4().hex,
                on_result=lambda seconds, result, execution: done.append(seconds),
            )
        timer.join()
    assert failures == {}
    assert len(done) == 15


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


def test_running_scheduler_gives_the_bytes_of_a_local_cluster(tiny_job, finished, tmp_path):
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


def return_and_die(order):
    number, marker = order
    if number % 5 == 0 and first_time(f"{marker}-{number}"):
        threading.Timer(number / 2_000, os._exit, [9]).start()
    return number


def test_results_that_workers_take_with_them_are_made_again(tmp_path):
    """Workers that end at different moments after their task is done: before, while and after its result is fetched."""
    settings = ClusterSettings(workers=2, max_attempts=50, retry_seconds=0)
    done = []
    with open_cluster(settings) as cluster:
        tasks = [(number, str(tmp_path / "died")) for number in range(60)]
        failures = cluster.map_tasks(
            return_and_die, tasks, name=lambda task: str(task[0]), on_result=lambda task, result, _: done.append(result)
        )
    assert failures == {}
    assert sorted(done) == list(range(60))


async def give_up():
    raise asyncio.CancelledError


@pytest.mark.parametrize("instead", [lambda: asyncio.sleep(3600), give_up])
def test_a_result_that_does_not_come_is_made_again(cluster, tmp_path, monkeypatch, instead):
    """Dask may wait without end for a result that was lost with its worker, or break off."""
    gather, asked = cluster.client.gather, []

    def gather_too_late(futures, **options):
        asked.append(set(futures))
        return instead() if len(asked) == 1 or set(futures) & asked[0] else gather(futures, **options)

    monkeypatch.setattr(cluster.client, "gather", gather_too_late)
    monkeypatch.setattr(flight_module, "_SECONDS_TO_FETCH", 0.2)
    monkeypatch.setattr(flight_module, "_SECONDS_TO_FETCH_ONE", 0.1)
    done = []
    failures = cluster.map_tasks(
        task,
        [("works", str(number)) for number in range(6)],
        name=lambda order: order[1],
        on_result=lambda order, _, execution: done.append((order[1], execution.attempt)),
    )
    assert failures == {}
    assert sorted(done) == [(str(number), 1) for number in range(6)]
    assert asked[0]
