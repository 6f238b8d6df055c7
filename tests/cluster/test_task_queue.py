"""Tasks on a real local cluster: what is tried again, what is set aside, what ends the run."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid

import pytest
from distributed import LocalCluster

from fakes.outputs import wait_for
from fakes.tasks import return_and_die, run_orders, task
from softshard.cluster import task_queue
from softshard.cluster.cluster import Cluster, open_cluster
from softshard.config import ClusterSettings
from softshard.errors import PartsFailed, StorageFull
from softshard.telemetry import SilentReporter


def test_all_tasks_are_run_whatever_their_number(cluster, tmp_path):
    results, failures = run_orders(cluster, tmp_path, *[f"task {index}" for index in range(40)])
    assert len(results) == 40
    assert failures == {}


def test_lost_worker_and_lost_network_are_tried_again(cluster, tmp_path):
    results, failures = run_orders(cluster, tmp_path, "dies once", "fails once", "fine")
    assert results == {"dies once": "DIES ONCE", "fails once": "FAILS ONCE", "fine": "FINE"}
    assert failures == {}


def test_what_keeps_failing_and_what_is_wrong_are_set_aside_and_the_rest_goes_on(cluster, tmp_path):
    results, failures = run_orders(cluster, tmp_path, "always fails", "bad data", "fine")
    assert results == {"fine": "FINE"}
    assert sorted(failures.values()) == [
        "DataInvalid: this cannot be right (attempt 1)",
        "OSError: the network is gone (attempt 3)",
    ]


def test_a_failed_task_is_tried_again_on_another_worker(cluster, tmp_path):
    wait_for(lambda: workers_of(cluster) == 2)
    results, _ = run_orders(cluster, tmp_path, "fails where it began")
    first, second = results["fails where it began"]
    assert first != second


def test_each_failure_is_told_with_its_attempt_and_reason(cluster, tmp_path):
    told = []
    run_orders(
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
        results, failures = run_orders(alone, tmp_path, "always dies", *[f"task {index}" for index in range(7)])
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


def test_paused_tasks_let_others_pass(tmp_path):
    with open_cluster(ClusterSettings(workers=1, retry_seconds=4.0)) as alone:
        order = []
        run_orders(alone, tmp_path, "fails once", "fine", "task", heard=order)
    assert order == ["fine", "task", "fails once"]


@pytest.mark.parametrize(("what", "error"), [("full", StorageFull), ("bug", TypeError)])
def test_full_disk_and_a_bug_end_the_run(cluster, tmp_path, what, error):
    with pytest.raises(error):
        run_orders(cluster, tmp_path, "fine", what)


def test_client_hears_what_tasks_say(cluster, tmp_path):
    heard = []
    cluster.on_message(heard.append)
    run_orders(cluster, tmp_path, "speaks", *["fine"] * 10)
    assert heard == [{"said": "hello"}]


class Listener(SilentReporter):
    def __init__(self):
        self.events = []

    def event(self, name, /, **values):
        self.events.append((name, values))


def test_a_process_whose_engine_does_not_open_is_started_anew_and_no_task_is_lost(cluster, tmp_path):
    wait_for(lambda: workers_of(cluster) == 2)
    listener = Listener()
    orders = ["breaks its process", *(f"needs an engine {number}" for number in range(20))]
    # With one attempt, a task that is blamed for what its worker did would be set aside.
    settings = cluster.settings.model_copy(update={"max_attempts": 1})
    results, failures = run_orders(Cluster(cluster.client, settings, listener), tmp_path, *orders)
    assert failures == {}
    assert sorted(results) == sorted(orders)
    ((event, values),) = listener.events
    assert event == "worker_restarted"
    assert values["reason"] == "CUDA error: an illegal memory access was encountered"
    wait_for(lambda: workers_of(cluster) == 2)
    assert values["worker"] not in cluster.addresses()


def test_a_worker_that_is_retired_does_not_come_back(cluster):
    wait_for(lambda: workers_of(cluster) == 2)
    first, second = cluster.addresses()
    cluster.retire(first)
    cluster.replenish()
    assert list(cluster.addresses()) == [second]
    cluster.client.cluster.scale(2)
    wait_for(lambda: workers_of(cluster) == 2)


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


def workers_of(cluster):
    return len(cluster.addresses())


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
    monkeypatch.setattr(task_queue, "_SECONDS_TO_FETCH", 0.2)
    monkeypatch.setattr(task_queue, "_SECONDS_TO_FETCH_SINGLE", 0.1)
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
