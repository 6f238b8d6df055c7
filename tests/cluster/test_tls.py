"""A Dask cluster that speaks TLS alone runs the job, and turns away whoever has no certificate of its authority."""

import datetime
import json
import os
import re
import subprocess
import sys
import time

import dask
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from softshard.cli import main
from softshard.cluster.cluster import open_cluster
from softshard.config import ClusterSettings
from softshard.errors import TryAgain
from softshard.shard.manifest import read_manifest


def certified(folder):
    """A certificate authority of our own, and one certificate of it that scheduler, workers and client share."""
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "softshard")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in keys}
    for name, key in keys.items():
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["authority"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .sign(keys["authority"], hashes.SHA256())
        )
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = serialization.PrivateFormat.PKCS8
        content = key.private_bytes(serialization.Encoding.PEM, pem, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(content)


@pytest.fixture
def environment(tmp_path):
    """What docs/operation.md has scheduler, workers and client set."""
    certified(tmp_path)
    tls = "DASK_DISTRIBUTED__COMM__TLS__"
    settings = {f"{tls}CA_FILE": "authority.crt"}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        settings |= {f"{tls}{role}__CERT": "softshard.crt", f"{tls}{role}__KEY": "softshard.key"}
    paths = {name: str(tmp_path / file) for name, file in settings.items()}
    return {**os.environ, **paths, "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}


@pytest.fixture
def encrypted(tmp_path, environment):
    """Address of a running scheduler with one worker, both on loopback."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    commands = [
        [*dask, "scheduler", "--protocol", "tls", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"],
        [*dask, "worker", "--nworkers", "1", "--nthreads", "1", "--resources", "teacher=1", "--no-dashboard"],
    ]
    commands[1] += ["--host", "tls://127.0.0.1", "--local-directory", str(tmp_path)]
    running = [
        subprocess.Popen([*command, "--scheduler-file", str(file)], env=environment, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    until = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    yield file
    for process in running:
        process.terminate()
    for process in running:
        process.wait(timeout=30)


def softshard(*arguments, environment):
    command = [sys.executable, "-m", "softshard.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)


@pytest.mark.slow
def test_job_runs_on_a_cluster_that_speaks_tls_alone_and_strangers_do_not(
    tiny_job, tmp_path, environment, encrypted, monkeypatch
):
    settings = {"teacher": {"folds": 0}, "train": {"retention": None}}
    job = tiny_job(tmp_path, **settings, cluster={"scheduler_file": str(encrypted)})
    assert main(["corpus", str(job), "--quiet"]) == 0
    address = json.loads(encrypted.read_text())["address"]
    assert address.startswith("tls://127.0.0.1:")

    without = {name: value for name, value in environment.items() if not name.startswith("DASK_")}
    refused = softshard("targets", job, "--quiet", environment=without)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"softshard: {address}: this scheduler requires TLS certificates")
    assert refused.stderr.count("\n") == 1

    (tmp_path / "another").mkdir()
    certified(tmp_path / "another")
    theirs = {"ca-file": "authority.crt", "client.cert": "softshard.crt", "client.key": "softshard.key"}
    files = {f"distributed.comm.tls.{name}": str(tmp_path / "another" / file) for name, file in theirs.items()}
    monkeypatch.setattr("softshard.cluster.cluster._SECONDS_TO_CONNECT", 3)
    with (
        dask.config.set(files),
        pytest.raises(TryAgain, match=re.escape(address)),
        open_cluster(ClusterSettings(scheduler=address)),
    ):
        pass

    done = softshard("targets", job, "--quiet", environment=environment)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out/targets").parts
