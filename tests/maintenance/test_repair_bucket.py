"""Lease, verification, repair and garbage in a bucket, on a server that fails now and then."""

import json

import pytest
import yaml

from fakes.s3_server import chaos, moto, proxy, spoiled_server  # noqa: F401
from softshard.cli import main
from softshard.errors import OutputBusy
from softshard.output.lease import Pace, hold_lease
from softshard.shard.manifest import read_manifest
from softshard.storage import LocalStore, ObjectStore

OUT = "s3://box/repair"
FAST = Pace(interval_seconds=0.1, expiry_seconds=2)


@pytest.fixture
def out(finished, scheduler, proxy):  # noqa: F811
    """The objects of a finished output, in a bucket that is otherwise empty."""
    store, local = ObjectStore(OUT), LocalStore(finished)
    for path in store.list("."):
        store.remove(path)
    for path in local.list("."):
        store.put_once(path, local.read(path))
    job = yaml.safe_load(local.read("job.yaml")) | {"out": OUT}
    job["cluster"]["scheduler"] = scheduler
    store.replace("job.yaml", yaml.safe_dump(job).encode())
    proxy.chaos = chaos(0.05, seed=3)
    yield store
    proxy.chaos = None


def test_second_run_on_a_bucket_is_refused_and_a_dead_ones_lease_expires(proxy):  # noqa: F811
    proxy.chaos = chaos(0.1, seed=4)
    first, second = ObjectStore("s3://box/lease"), ObjectStore("s3://box/lease")
    with hold_lease(first, job="tales", run="first", pace=FAST):
        with (
            pytest.raises(OutputBusy, match="run first of job 'tales'"),
            hold_lease(second, job="x", run="y", pace=FAST),
        ):
            pass
        abandoned = first.read(".lease/000001.json")
    proxy.chaos = None
    assert first.list(".lease") == []
    elsewhere = json.loads(abandoned) | {"kernel": "of a machine that has died"}
    first.create_exclusive(".lease/000001.json", json.dumps(elsewhere).encode())
    with hold_lease(second, job="tales", run="second", pace=FAST):
        assert second.list(".lease") == [".lease/000001.json", ".lease/000002.json"]
    assert second.list(".lease") == []


def test_what_is_bad_in_a_bucket_is_found_made_again_and_the_rest_collected(finished, out, capsys):
    before = {path: out.read(path) for path in out.list(".")}
    part, lost, *_ = read_manifest(out.below("targets")).parts
    out.replace(f"targets/{part.path}", before[f"targets/{part.path}"][:-1] + b"X")
    out.remove(f"targets/{lost.path}")
    assert main(["verify", OUT, "--quiet", "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
    assert main(["repair", OUT, "--quiet", "--json"]) == 0
    repaired = json.loads(capsys.readouterr().out)
    assert sorted(repaired["made"]) == sorted(f"targets/{one.path}" for one in (part, lost))
    assert {
        path: content for path in out.list(".") if not path.startswith(".") for content in [out.read(path)]
    } == before
    assert main(["gc", OUT, "--yes", "--json"]) == 0
    assert {file["kind"] for file in json.loads(capsys.readouterr().out)["files"]} == {"set aside"}
    assert set(out.list(".")) == set(before)
