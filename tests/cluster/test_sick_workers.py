"""Workers whose engine does not open or whose device fails: started anew, retired, or none left."""

from __future__ import annotations

import pytest

from fakes.tasks import run_orders
from softshard.cluster.cluster import open_cluster
from softshard.cluster.retry import failure_action
from softshard.cluster.workers import WorkerHealth
from softshard.config import ClusterSettings
from softshard.errors import EngineNotOpened, TryAgain

SETTINGS = {"max_attempts": 3, "retry_seconds": 0.01}


@pytest.fixture
def running(scheduler):
    """A cluster of one worker without a nanny, which cannot be started anew."""
    with open_cluster(ClusterSettings(scheduler=scheduler, **SETTINGS)) as cluster:
        yield cluster


class Workers:
    """Workers that all have a nanny: by name, the number of the present process."""

    def __init__(self, *names):
        self.processes, self.done = dict.fromkeys(names, 0), []

    def addresses(self):
        return {self.address(name): name for name in self.processes}

    def address(self, name):
        return f"{name}:{self.processes[name]}"

    def restart(self, address):
        name = self.addresses()[address]
        self.processes[name] += 1
        self.done.append(f"restart {name}")

    def retire(self, address):
        name = self.addresses()[address]
        del self.processes[name]
        self.done.append(f"retire {name}")

    def warn(self, event, *, worker, reason, message):
        assert worker in message
        assert reason in message


def test_a_worker_that_keeps_failing_is_retired_when_another_one_works():
    workers = Workers("a", "b")
    health = WorkerHealth(workers)
    for _ in range(3):
        health.succeeded(workers.address("b"))
        health.failed(workers.address("a"), "the device is gone")
    assert workers.done == ["restart a", "restart a", "retire a"]
    assert health.others([]) == ["b:0"]


def test_one_process_counts_once_however_many_of_its_tasks_fail():
    workers = Workers("a", "b")
    health = WorkerHealth(workers)
    health.succeeded("b:0")
    for _ in range(9):
        health.failed("a:0", "the device is gone")
    assert workers.done == ["restart a"]
    assert health.was_ended("a:0")
    assert not health.was_ended("a:1")


def test_a_success_on_a_worker_forgives_what_it_has_failed():
    workers = Workers("a")
    health = WorkerHealth(workers)
    for _ in range(9):
        health.failed(workers.address("a"), "the device is gone")
        health.succeeded(workers.address("a"))
    assert workers.done == ["restart a"] * 9


def test_nothing_is_retired_while_no_worker_has_worked_and_when_all_keep_failing_the_run_ends():
    workers = Workers("a", "b")
    health = WorkerHealth(workers)
    for name in "aaaabb":
        health.failed(workers.address(name), "the device is gone")
    with pytest.raises(TryAgain, match="no worker is left that works: b:2 failed 3 times in a row, the device is gone"):
        health.failed(workers.address("b"), "the device is gone")
    assert set(workers.done) == {"restart a", "restart b"}


def test_without_a_worker_that_works_the_run_may_be_tried_again(running, tmp_path):
    (tmp_path / "sick").write_text("all")
    with pytest.raises(TryAgain, match=r"no worker is left that works: tcp://.* failed 3 times in a row, CUDA error"):
        run_orders(running, tmp_path, *[f"needs an engine {number}" for number in range(9)])
    assert len(running.addresses()) == 1


def test_a_task_with_which_every_device_fails_is_set_aside_and_the_rest_goes_on(running, tmp_path):
    results, failures = run_orders(running, tmp_path, "fine", "device is lost", *["works"] * 20)
    assert results == {"fine": "FINE", "works": "WORKS"}
    (reason,) = failures.values()
    assert reason == "RuntimeError: CUDA error: device-side assert triggered (attempt 3)"


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (RuntimeError("CUDA error: out of resources"), "blame_worker"),
        (RuntimeError("Found no NVIDIA driver on your system."), "blame_worker"),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), "blame_worker"),
        (RuntimeError("No CUDA GPUs are available"), "blame_worker"),
        (EngineNotOpened(engine="vllm", problem="address already in use"), "blame_worker"),
        (RuntimeError("a shape is wrong"), "fail"),
        (OSError("the network is gone"), "retry"),
    ],
)
def test_what_is_a_workers_own_fault(error, action):
    assert failure_action(error) == action
