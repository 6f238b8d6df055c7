"""Ends runs of the targets stage by SIGKILL, again and again, and compares what is left with an undisturbed run.

In: a job. A round begins with its corpus and style teacher but without targets, and is over when a run ends with 0,
however many kills that takes. What is killed: workers and the client right before each change that they make to the
output (see `saboteur/sitecustomize.py`), both at random moments, and the scheduler of a cluster by address. Out: how
many processes were killed, which files are missing or differ afterwards, and how often slices were scored.

`make kill-test` does it in full and ends with a line of these numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from softshard.errors import EXIT_TRY_AGAIN

__all__ = ["Tally", "prepare", "run_kills"]

_SABOTEUR = Path(__file__).parent / "saboteur"
_WORKERS = 2
_SECONDS_OF_A_RUN = 300
_CHANGES_OF_A_PART = 6
"""A part and its receipt: each written aside, linked, and its other name removed."""
_CHANGES_OF_A_CLIENT = 12
_SECONDS_OF_ORPHANS = 30.0
_FAMILY = "KILLS_FAMILY"
"""Variable that a process and all that it starts have in common."""


@dataclass
class Tally:
    """What was done, and what came of it."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("worker", "client", "scheduler"), 0))
    rounds: int = 0
    lost: set[str] = field(default_factory=set)
    """Files of the undisturbed run that a round lacks."""
    differing: set[str] = field(default_factory=set)
    """Files that have other bytes, or that the undisturbed run does not have."""
    unexplained: int = 0
    """Slices that were scored more often than kills explain."""

    @property
    def num_kills(self) -> int:
        """Of all kinds."""
        return sum(self.kills.values())

    def line(self) -> str:
        """For the end of a full run."""
        return f"kills: {self.num_kills}, lost: {len(self.lost)}, differing: {len(self.differing)}"


@dataclass(frozen=True)
class Ground:
    """A job that can be run again and again."""

    job: Path
    out: Path
    expected: dict[str, str]
    """SHA-256 of every file below `targets/` after an undisturbed run."""

    @property
    def orders(self) -> Path:
        return self.job.parent / "orders"

    @property
    def num_parts(self) -> int:
        return sum(path.startswith("receipts/") for path in self.expected)


def prepare(job: Path) -> Ground:
    """Run the job's first three stages undisturbed; its output serves all rounds."""
    content = yaml.safe_load(job.read_text())
    content["cluster"] = {"workers": _WORKERS, "max_attempts": 1000, "retry_seconds": 0.1}
    content["corpus"]["sequences_per_part"] = 6
    job.write_text(yaml.safe_dump(content))
    for stage in ("corpus", "teacher", "targets"):
        subprocess.run(
            [sys.executable, "-m", "softshard.cli", stage, str(job), "--quiet"], check=True, stdout=subprocess.DEVNULL
        )
    out = Path(content["out"])
    return Ground(job=job, out=out, expected=_files(out / "targets"))


def _files(folder: Path) -> dict[str, str]:
    """Visible files and their digests; what a writer leaves in `.tmp/` when it is killed is nobody's."""
    found = [file for file in folder.rglob("*") if file.is_file() and ".tmp" not in file.parts]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def run_kills(ground: Ground, *, num_kills: int, seed: int, with_scheduler: bool, kills_per_round: int = 8) -> Tally:
    """Rounds of all kinds in turn until so many processes were killed."""
    tally, generator = Tally(), random.Random(seed)
    kinds = [_kill_workers, _kill_clients, _kill_at_random, *([_kill_schedulers] if with_scheduler else [])]
    at = 0
    while tally.num_kills < num_kills:
        _clear(ground)
        killed = dict(tally.kills)
        kinds[at % len(kinds)](ground, tally, generator, min(kills_per_round, num_kills - tally.num_kills))
        _compare(ground, tally, {role: tally.kills[role] - killed[role] for role in killed})
        at += 1
        print(f"round {at}: {tally.line()}", file=sys.stderr, flush=True)
    return tally


def _clear(ground: Ground) -> None:
    for folder in (ground.out / "targets", ground.orders):
        shutil.rmtree(folder, ignore_errors=True)
    (ground.orders / "opened").mkdir(parents=True)


def _compare(ground: Ground, tally: Tally, killed: dict[str, int]) -> None:
    there = _files(ground.out / "targets")
    tally.rounds += 1
    tally.lost |= ground.expected.keys() - there.keys()
    tally.differing |= {path for path, digest in there.items() if ground.expected.get(path) != digest}
    opened = sum(len(file.read_text().splitlines()) for file in (ground.orders / "opened").glob("worker-*"))
    # A worker has one part in hand; without client or scheduler all workers drop theirs.
    explained = killed["worker"] + _WORKERS * (killed["client"] + killed["scheduler"])
    tally.unexplained += max(0, opened - ground.num_parts - explained)


def _kill_workers(ground: Ground, tally: Tally, generator: random.Random, most: int) -> None:
    first = generator.randrange(2 * _CHANGES_OF_A_PART)
    changes = [(first + number) % (2 * _CHANGES_OF_A_PART) + 1 for number in range(most)]
    _give_orders(ground, tally, [("worker", change) for change in changes])


def _kill_clients(ground: Ground, tally: Tally, generator: random.Random, most: int) -> None:
    changes = sorted(generator.sample(range(1, _CHANGES_OF_A_CLIENT + 1), min(most, 4)))
    _give_orders(ground, tally, [("client", change) for change in changes])


def _give_orders(ground: Ground, tally: Tally, orders: list[tuple[str, int]]) -> None:
    """Run to the end; orders that no process comes to are not counted."""
    files = {ground.orders / f"{number:03d}-{role}-{change}": role for number, (role, change) in enumerate(orders)}
    for file in files:
        file.touch()
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        with _client(ground, ground.job) as client:
            code = client.wait(_SECONDS_OF_A_RUN)
    _expect(ground, code, 0)
    for file, role in files.items():
        tally.kills[role] += not file.exists()


def _kill_at_random(ground: Ground, tally: Tally, generator: random.Random, most: int) -> None:
    left = min(most, 6)
    code: int | None = -signal.SIGKILL
    while code != 0:
        before = left
        with _client(ground, ground.job) as client:
            while (code := _ended(client, generator.uniform(0.5, 4) if left else _SECONDS_OF_A_RUN)) is None:
                victim = generator.choice(["worker", "worker", "client"])
                left -= _kill(_workers_of(client) if victim == "worker" else [client], victim, tally)
        # Where all workers are killed as they come up, again and again, the run is to be tried again.
        _expect(ground, code, 0, *([-signal.SIGKILL, EXIT_TRY_AGAIN] if left < before else []))


def _kill_schedulers(ground: Ground, tally: Tally, generator: random.Random, most: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    job = ground.job.with_name("remote.yaml")
    job.write_text(yaml.safe_dump(yaml.safe_load(ground.job.read_text()) | {"cluster": {"scheduler": address}}))
    left, code = min(most, 2), EXIT_TRY_AGAIN
    while code != 0:
        with _cluster(ground, address) as scheduler, _client(ground, job) as client:
            if left and _ended(client, generator.uniform(4, 9)) is None:
                left -= _kill([scheduler], "scheduler", tally)
            code = client.wait(_SECONDS_OF_A_RUN)
        _expect(ground, code, 0, EXIT_TRY_AGAIN)


def _expect(ground: Ground, code: int | None, *expected: int) -> None:
    if code not in expected:
        said = (ground.orders / "said").read_text(errors="replace")[-2_000:]
        raise AssertionError(f"the run ended with {code}, expected {expected}; it said: {said}")


def _ended(process: psutil.Process, seconds: float) -> int | None:
    """Exit code; None while it runs on after so many seconds."""
    try:
        code: int = process.wait(seconds)
    except psutil.TimeoutExpired:
        return None
    return code


def _kill(victims: list[psutil.Process], role: str, tally: Tally) -> int:
    """Kill one of them, if there is one; how many were killed."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            tally.kills[role] += 1
            return 1
    return 0


def _workers_of(client: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = client.children(recursive=True)
        return [child for child in children if "multiprocessing.spawn" in " ".join(_command(child))]
    return []


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return command


def _environment(ground: Ground) -> dict[str, str]:
    path = os.pathsep.join([str(_SABOTEUR), os.environ.get("PYTHONPATH", "")])
    watched = {"ORDERS": str(ground.orders), "WATCHED": str(ground.out / "targets")}
    return os.environ | watched | {"PYTHONPATH": path, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}


@contextmanager
def _started(ground: Ground, *command: str) -> Iterator[psutil.Popen]:
    """A process; when the context ends it is gone, and all that it has started."""
    family = uuid.uuid4().hex
    with (ground.orders / "said").open("ab") as said:
        process = psutil.Popen(
            [sys.executable, "-m", *command],
            env=_environment(ground) | {_FAMILY: family},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
        _wait_for(family)


def _wait_for(family: str) -> None:
    """Workers notice by themselves that the client is gone. Raises AssertionError where they do not."""
    until = time.monotonic() + _SECONDS_OF_ORPHANS
    while any(_belongs(process, family) for process in psutil.process_iter()):
        if time.monotonic() > until:
            raise AssertionError(f"a process lives on {_SECONDS_OF_ORPHANS:g} s after the one that began it")
        time.sleep(0.05)


def _belongs(process: psutil.Process, family: str) -> bool:
    try:
        return process.environ().get(_FAMILY) == family
    except psutil.Error:
        return False


@contextmanager
def _client(ground: Ground, job: Path) -> Iterator[psutil.Popen]:
    with _started(ground, "softshard.cli", "targets", str(job), "--quiet", "--debug") as client:
        yield client


@contextmanager
def _cluster(ground: Ground, address: str) -> Iterator[psutil.Popen]:
    """A scheduler and its workers, as separate commands."""
    port = address.rpartition(":")[2]
    worker = ("distributed.cli.dask_worker", address, "--resources", "teacher=1", "--nthreads", "1", "--no-dashboard")
    with ExitStack() as stack:
        scheduler = stack.enter_context(
            _started(ground, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
        )
        for _ in range(_WORKERS):
            stack.enter_context(_started(ground, *worker, "--memory-limit", "0"))
        yield scheduler


def _write_job(folder: Path) -> Path:
    """A job on a tiny model, with nothing but what the first three stages need."""
    from fakes.tiny import save_tiny_model, write_documents

    source = {"name": "tales", "style": "literary", "license": "CC0-1.0", "rights_basis": "owned"}
    documents = write_documents(folder / "tales.jsonl", num_documents=60)
    job = folder / "job.yaml"
    content = {
        "name": "kills",
        "out": str(folder / "out"),
        "corpus": {
            "sources": [source | {"uri": str(documents)}],
            "context_tokens": 48,
            "overlap_tokens": 8,
            "holdout_fraction": 0.2,
        },
        "teacher": {"model": str(save_tiny_model(folder / "model")), "training_dtype": "float32"},
        "evaluate": {"prompt_tokens": 8, "sample_tokens": 16},
    }
    job.write_text(yaml.safe_dump(content))
    return job


def _main() -> int:
    parser = argparse.ArgumentParser(prog="kills.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="processes to kill (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and changes (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        ground = prepare(_write_job(Path(folder)))
        tally = run_kills(ground, num_kills=arguments.kills, seed=arguments.seed, with_scheduler=True)
    by_role = ", ".join(f"{number} {role}" for role, number in tally.kills.items())
    print(f"{tally.rounds} rounds of {ground.num_parts} parts; killed: {by_role}; scored beyond what kills explain:")
    print(tally.unexplained)
    print(tally.line())
    return 0 if not (tally.lost or tally.differing or tally.unexplained) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    raise SystemExit(_main())
