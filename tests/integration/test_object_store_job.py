"""A whole job whose inputs and output lie in a bucket, on a server that fails again and again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
import zstandard

from fakes.s3_server import ACCESS_KEY, SECRET_KEY, chaos, make_bucket, moto, refuse, running_proxy, use_server  # noqa: F401
from softshard.cli import main
from softshard.storage import LocalStore, ObjectStore

SHARE_SPOILED = 0.2
OUT = "s3://box/runs/tiny"


@pytest.fixture(scope="module")
def on_s3(tiny_job, moto, tmp_path_factory):  # noqa: F811
    """The folder of a job that was run from the command line, and the proxy that spoiled its requests."""
    folder = tmp_path_factory.mktemp("s3-job")
    with pytest.MonkeyPatch.context() as patch, running_proxy(moto) as proxy:
        use_server(patch, proxy.url)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_bucket("box")
        job = yaml.safe_load(tiny_job(folder, out=OUT).read_text())
        for source in (job["corpus"]["sources"][0], job["train"]["retention"]["sources"][0]):
            name = f"{source['name']}.jsonl.zst"
            packed = zstandard.ZstdCompressor().compress(Path(source["uri"]).read_bytes())
            ObjectStore("s3://box/in").put_once(f"{source['name']}/{name}", packed)
            source["uri"] = f"s3://box/in/{source['name']}"
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        proxy.chaos = chaos(SHARE_SPOILED, seed=7)
        assert main(["run", str(folder / "job.yaml"), "--quiet", "--log", str(folder / "log.jsonl")]) == 0
        proxy.chaos = None
        yield folder, proxy


def objects(store, folder):
    return {path: store.read(path) for path in store.list(folder)}


def test_targets_and_adapters_are_those_of_the_local_run_to_the_byte(on_s3, finished):
    assert on_s3[1].spoiled > 20
    local, remote = LocalStore(finished), ObjectStore(OUT)
    for folder in ("corpus/sequences", "targets", "teacher", "adapter"):
        expected, found = objects(local, folder), objects(remote, folder)
        assert found.keys() == expected.keys()
        differing = [path for path, content in expected.items() if found[path] != content]
        # The records of a training hold the job's settings, and with them where its text lies.
        assert [path for path in differing if not (folder == "adapter" and path.endswith(".json"))] == []


def test_the_same_command_again_finds_everything_done(on_s3):
    folder, proxy = on_s3
    before = objects(ObjectStore(OUT), ".")
    proxy.seen.clear()
    assert main(["run", str(folder / "job.yaml"), "--quiet"]) == 0
    assert objects(ObjectStore(OUT), ".") == before
    assert not [request for request in proxy.seen if request.is_for("PUT") and "/data/" in request.path]


def test_every_command_reads_the_bucket(on_s3, capsys):
    folder, _ = on_s3
    assert main(["status", OUT, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [stage["complete"] for stage in status["stages"]] == [True] * 5
    assert main(["verify", OUT, "--deep", "--quiet"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["show", OUT, "--sequence", status["sequences"][0][:12]]) == 0
    assert status["sequences"][0] in capsys.readouterr().out
    assert main(["plan", str(folder / "job.yaml"), "--quiet", "--tokens-per-second", "1000"]) == 0
    assert main(["status", OUT, "--watch", "--json"]) == 0


def test_a_machine_without_a_copy_of_the_adapters_fetches_them(on_s3, capsys):
    folder, proxy = on_s3
    shutil.rmtree(folder / "cache")
    proxy.seen.clear()
    assert main(["verify", OUT, "--against-teacher", "2", "--quiet"]) == 0
    assert "the stored targets agree with the teacher" in capsys.readouterr().out
    assert list((folder / "cache").rglob("adapter_model.safetensors"))


def test_no_credential_is_in_what_is_left(on_s3, capfd):
    folder, proxy = on_s3
    # The server quotes the request's signature and the secret key itself.
    proxy.spoil(refuse("AccessDenied", 403), "GET", "HEAD", "PUT", times=100)
    for command in ("verify", "run"):
        job = {"verify": OUT, "run": str(folder / "job.yaml")}[command]
        assert main([command, job, "--debug", "--log", str(folder / f"{command}-failed.jsonl")]) == 2
    proxy.spoilers.clear()
    left = [*objects(ObjectStore(OUT), ".").values(), *(file.read_bytes() for file in folder.glob("*.jsonl"))]
    said = capfd.readouterr()
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert not [content for content in left if secret.encode() in content]
        assert secret not in said.out + said.err


def test_another_job_is_refused_and_a_full_bucket_is_not_taken_for_an_output(on_s3, tiny_job, tmp_path, capsys):
    assert main(["run", str(tiny_job(tmp_path, out=OUT, name="another")), "--quiet"]) == 2
    assert "belongs to job 'tiny'" in capsys.readouterr().err
    assert main(["run", str(tiny_job(tmp_path, out="s3://box")), "--quiet"]) == 2
    assert "this folder holds other files and no job.yaml" in capsys.readouterr().err
