"""Scheduler, workers, client and bucket on hosts of their own, one of which is cut off while the parts are scored.

A host is a network namespace with one cable to a switch that is a namespace too; to cut a host off is to pull its
cable. Nobody is told: packets are no longer answered, as where a switch or a machine's power fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from fakes.s3_server import ACCESS_KEY, SECRET_KEY
from fakes.tiny import write_documents
from softshard.cli import main
from softshard.errors import EXIT_TRY_AGAIN
from softshard.shard.manifest import read_manifest

HOSTS = ("scheduler", "one", "two", "client", "bucket")
PORT = 8786
BUCKET = "http://10.77.0.5:5000"
MAKE_BUCKET = f"""
import time, urllib.error, urllib.request
for _ in range(300):
    try:
        urllib.request.urlopen(urllib.request.Request("{BUCKET}/box", method="PUT"), timeout=5)
        break
    except urllib.error.URLError:
        time.sleep(0.1)
"""
PROMPT = {
    # By default a peer that says nothing is given up after 30 s.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
    "AWS_ENDPOINT_URL": BUCKET,
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
}
pytestmark = pytest.mark.slow
STARVED = "network namespaces are not allowed on this machine (needs CAP_NET_ADMIN and iproute2)"


def address_of(host: str) -> str:
    return f"10.77.0.{HOSTS.index(host) + 1}"


class Network:
    """Hosts on one switch."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._prefix, self._stack, self.folder = f"softshard-{uuid.uuid4().hex[:6]}", stack, folder
        for name in ("switch", *HOSTS):
            self._add(name)
        self.inside("switch", "ip", "link", "add", "bridge", "type", "bridge")
        self.inside("switch", "ip", "link", "set", "bridge", "up")
        for host in HOSTS:
            cable = ["ip", "link", "add", host, "type", "veth", "peer", "name", "cable", "netns", self._name(host)]
            self.inside("switch", *cable)
            self.inside("switch", "ip", "link", "set", host, "master", "bridge", "up")
            self.inside(host, "ip", "address", "add", f"{address_of(host)}/24", "dev", "cable")
            self.inside(host, "ip", "link", "set", "cable", "up")
            self.inside(host, "ip", "link", "set", "lo", "up")

    def cut(self, host: str) -> None:
        self.inside("switch", "ip", "link", "set", host, "down")

    def join(self, host: str) -> None:
        self.inside("switch", "ip", "link", "set", host, "up")

    def start(self, host: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A module of Python on a host; it is gone when the network is."""
        said = self.folder / f"{host}.said"
        with said.open("ab") as file:
            process = subprocess.Popen(
                self._command(host, sys.executable, "-m", *map(str, arguments)),
                env=os.environ | PROMPT,
                stdout=file,
                stderr=file,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def run(self, host: str, *arguments: object) -> int:
        return self.start(host, *arguments).wait(timeout=200)

    def said(self, host: str) -> str:
        return (self.folder / f"{host}.said").read_text(errors="replace")

    def _add(self, name: str) -> None:
        subprocess.run(["ip", "netns", "add", self._name(name)], check=True, capture_output=True)
        self._stack.callback(subprocess.run, ["ip", "netns", "delete", self._name(name)], check=True)

    def inside(self, name: str, *command: str) -> None:
        subprocess.run(self._command(name, *command), check=True, capture_output=True)

    def _command(self, name: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self._name(name), *command]

    def _name(self, name: str) -> str:
        return f"{self._prefix}-{name}"


@contextmanager
def built(folder: Path) -> Iterator[Network]:
    with ExitStack() as stack:
        try:
            network = Network(stack, folder)
        except (FileNotFoundError, subprocess.CalledProcessError):
            pytest.skip(STARVED)
        yield network


@pytest.fixture
def network(tmp_path) -> Iterator[Network]:
    """All hosts, with a scheduler, a worker on each of two, and a bucket."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    with built(folder) as network:
        network.start("bucket", "moto.server", "-H", address_of("bucket"), "-p", "5000")
        scheduler = ("--host", address_of("scheduler"), "--port", PORT, "--no-dashboard")
        network.start("scheduler", "distributed.cli.dask_scheduler", *scheduler)
        for host in ("one", "two"):
            start_worker(network, host)
        network.inside("client", sys.executable, "-c", MAKE_BUCKET)
        yield network


def start_worker(network: Network, host: str) -> None:
    worker = ("--host", address_of(host), "--nthreads", "1", "--resources", "teacher=1", "--no-dashboard")
    place = ("--local-directory", network.folder / host, "--memory-limit", "0")
    scheduler = f"tcp://{address_of('scheduler')}:{PORT}"
    network.start(host, "distributed.cli.dask_worker", scheduler, *worker, *place)


@pytest.fixture(scope="module")
def job(tiny_job, tmp_path_factory):
    """Writes a job of many short parts: `job(folder, out=..., cluster=...)`."""
    documents = write_documents(tmp_path_factory.mktemp("documents") / "many.jsonl", num_documents=100)

    def write(folder: Path, **changes: object) -> Path:
        teacher, train = {"folds": 0}, {"retention": None}
        path = tiny_job(folder, corpus={"sequences_per_part": 2}, teacher=teacher, train=train, **changes)
        content = yaml.safe_load(path.read_text())
        content["corpus"]["sources"][0]["uri"] = str(documents)
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    """Digest of the manifest of a run on this machine alone; it names the bytes of every part."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = job(folder)
    assert main(["corpus", str(path), "--quiet"]) == main(["targets", str(path), "--quiet"]) == 0
    return read_manifest(folder / "out/targets").digest


def on_cluster(job, folder: Path, out: object) -> Path:
    scheduler = f"tcp://{address_of('scheduler')}:{PORT}"
    return job(folder, out=str(out), cluster={"scheduler": scheduler, "retry_seconds": 0.1})


def events(log: Path, name: str) -> list[dict]:
    if not log.exists():
        return []
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [fact for line in lines if (fact := json.loads(line))["event"] == name]


def committed_by(host: str, log: Path) -> list[dict]:
    return [fact for fact in events(log, "part_committed") if f"//{address_of(host)}:" in fact["worker"]]


def both_have_begun(log: Path) -> bool:
    return len(committed_by("one", log)) > 2 < len(committed_by("two", log))


def wait_until(condition, client: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert client.poll() is None, f"the run ended too early, with {client.returncode}"
        assert time.monotonic() < until
        time.sleep(0.02)


def start_targets(network: Network, path: Path, log: Path) -> subprocess.Popen[bytes]:
    assert network.run("client", "softshard.cli", "corpus", path, "--quiet") == 0, network.said("client")
    return network.start("client", "softshard.cli", "targets", path, "--quiet", "--log", log)


def check(network: Network, out: object, log: Path, undisturbed: str) -> None:
    """All parts are there, whole, and the ones of an undisturbed run."""
    (complete,) = events(log, "targets_complete")
    assert complete["manifest"] == undisturbed
    assert network.run("client", "softshard.cli", "verify", out, "--deep", "--quiet") == 0, network.said("client")


def test_worker_that_is_cut_off_costs_its_parts_in_hand(network, job, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    client = start_targets(network, on_cluster(job, tmp_path, out), log)
    wait_until(lambda: both_have_begun(log), client)
    network.cut("one")
    assert client.wait(timeout=200) == 0, network.said("client")
    assert len(events(log, "part_retried")) == 1, "the part that it had begun"
    assert len(committed_by("one", log)) < len(committed_by("two", log))
    network.join("one")
    check(network, out, log, undisturbed)


def test_workers_that_are_all_cut_off_from_the_bucket_too_are_replaced_by_one_that_comes_later(
    network, job, undisturbed, tmp_path
):
    out, log = "s3://box/runs/tiny", tmp_path / "log.jsonl"
    client = start_targets(network, on_cluster(job, tmp_path, out), log)
    wait_until(lambda: both_have_begun(log), client)
    for host in ("one", "two"):
        network.cut(host)
    wait_until(lambda: "Lost all workers" in network.said("scheduler"), client)
    before = len(events(log, "part_committed"))
    network.join("one")
    start_worker(network, "one")
    assert client.wait(timeout=200) == 0, network.said("client")
    later = events(log, "part_committed")[before:]
    assert len(later) > 0
    assert {fact["part"] for fact in later} <= {fact["part"] for fact in committed_by("one", log)}
    check(network, out, log, undisturbed)


@pytest.mark.parametrize("host", ["client", "scheduler"])
def test_client_and_scheduler_that_lose_each_other_try_again_later(host, network, job, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    path = on_cluster(job, tmp_path, out)
    client = start_targets(network, path, log)
    wait_until(lambda: both_have_begun(log), client)
    network.cut(host)
    assert client.wait(timeout=200) == EXIT_TRY_AGAIN, network.said("client")
    assert not (out / "targets/manifest.json").exists()
    network.join(host)
    if host == "scheduler":
        for worker in ("one", "two"):
            start_worker(network, worker)
    committed = len(events(log, "part_committed"))
    assert network.run("client", "softshard.cli", "targets", path, "--quiet", "--log", log) == 0, network.said("client")
    assert 0 < len(events(log, "part_committed")) - committed < len(read_manifest(out / "targets").parts)
    check(network, out, log, undisturbed)
