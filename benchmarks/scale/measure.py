"""What does a part cost beyond its teacher, and do client and scheduler grow with the number of parts?

- `scheduling_ms_per_part`: CPU time that client and scheduler spend on a part of a teacher that answers at once. They
  and two workers are separate processes on this machine. The table and the details also have the wall-clock time per
  part, in which all of these share the machine's cores, and the same for parts that are built and committed.
- `commit_over_write`: time to commit a part of 3 MB, about 256 sequences of 512 tokens, and its receipt, over that of a
  bare write and fsync of the same bytes as two files; the median of alternating pairs. The bare write uses blocks of
  1 MiB, as the commit does: in one piece it is slower. The details have other sizes.
- `client_memory_ratio`: peak memory of a client that runs 20,000 parts from the corpus's manifest to that of the
  targets, over that of one with 1,000; the details have the scheduler's.
- `two_workers_over_two_processes`: speed of two workers of a local cluster, over that of two bare processes which score
  the same slices side by side with the same task; one thread each, real model, real prose. The best of several turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import Options, Result, interleaved, require, say, say_table
from benchmarks.scale.instant_teacher import peak_mib, write_corpus
from benchmarks.scale.workers_and_processes import open_sides
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.commit import commit_part, receipt_path
from softshard.shard.manifest import Receipt, read_manifest
from softshard.shard.schema import Fidelity
from softshard.storage import LocalStore

_ROOT = Path(__file__).parents[2]
_WORKERS = 2
_WARM_UP = 64
_BLOCK_BYTES = 2**20
_PART_BYTES = 3_000_000
_SIZES = {"20 kB": 20_000, "500 kB": 500_000, "3 MB": _PART_BYTES, "12 MB": 12_000_000}
_SECONDS_TO_START = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOp:
    """A run without a teacher."""

    num_parts: int
    ms_per_part: float
    client_cpu_ms: float
    """Of one part."""
    scheduler_cpu_ms: float
    client_mib: float
    scheduler_mib: float


def _measure_no_op(function: str, num_parts: int) -> NoOp:
    """One run, its client and its scheduler in fresh processes; see instant_teacher.py."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".scale-") as scratch:
        folder = Path(scratch).absolute()
        write_corpus(folder / "warm-up", _WARM_UP)
        write_corpus(folder / "run", num_parts)
        with _running_cluster(folder) as (scheduler_file, scheduler):
            before = sum(scheduler.cpu_times()[:2])
            module = "benchmarks.scale.instant_teacher"
            command = [sys.executable, "-m", module, str(folder), scheduler_file, function]
            client = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
            cpu_seconds = sum(scheduler.cpu_times()[:2]) - before
            figures = json.loads(client.stdout.splitlines()[-1])
            scheduler_mib = peak_mib(scheduler.pid)
        require(figures["num_parts"] == num_parts, f"{function}: {num_parts:,} parts came back")
        if function == "commit":
            store = LocalStore(folder / "run" / "targets")
            manifest = read_manifest(store)
            whole = len({part.part_id for part in manifest.parts}) == num_parts == len(store.list("receipts"))
            sizes = all(store.size(part.path) == part.num_bytes for part in manifest.parts)
            require(whole and sizes, "the manifest names every part once, and every part and receipt is there")
    return NoOp(
        num_parts=num_parts,
        ms_per_part=1e3 * figures["seconds"] / num_parts,
        client_cpu_ms=1e3 * figures["cpu_seconds"] / num_parts,
        scheduler_cpu_ms=1e3 * cpu_seconds / (num_parts + _WARM_UP),
        client_mib=figures["peak_mib"],
        scheduler_mib=scheduler_mib,
    )


@contextmanager
def _running_cluster(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A scheduler and two workers, started as on a cluster; the scheduler's file, and its process."""
    file = folder / "scheduler.json"
    address = ("--host", "127.0.0.1", "--scheduler-file", str(file))
    scheduler = ("dask_scheduler", *address, "--port", "0", "--dashboard-address", "127.0.0.1:0")
    worker = ("dask_worker", *address, "--nthreads", "1", "--resources", "teacher=1", "--no-nanny", "--no-dashboard")
    processes = [_start(folder, scheduler)]
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not file.exists():
            require_started(processes[0], deadline)
            time.sleep(0.1)
        processes += [_start(folder, worker) for _ in range(_WORKERS)]
        yield str(file), psutil.Process(processes[0].pid)
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def require_started(process: subprocess.Popen[bytes], deadline: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        raise TimeoutError("the scheduler did not start")


def _start(folder: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    module, *arguments = command
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _environment() -> dict[str, str]:
    """Processes that are started here import the benchmarks as this one does."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # What docs/scale.md says of a scheduler.
    log_length = {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **log_length}


def _commit_over_write(num_bytes: int, *, repeats: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=".", prefix=".scale-") as scratch:
        folder = Path(scratch)
        store, bare = LocalStore(folder / "store"), folder / "bare"
        bare.mkdir()
        pairs = []
        for number in range(repeats + 1):
            content = generator.bytes(num_bytes)
            receipt = _receipt(number, content)
            ways: list[Callable[[], object]] = [
                lambda content=content, receipt=receipt: commit_part(store, content, receipt),
                lambda content=content, receipt=receipt, number=number: _write(bare, str(number), content, receipt),
            ]
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {way: _seconds(ways[way]) for way in order}
            pairs.append((seconds[0], seconds[1]))
            written = (bare / f"{number}.parquet").read_bytes(), (bare / f"{number}.json").read_bytes()
            if written != (store.read(receipt.path), store.read(receipt_path(receipt.part_id))):
                require(False, "both leave the same bytes")
    # The first pair also makes folders.
    pairs = pairs[1:]
    return {
        "ratio": statistics.median(commit / write for commit, write in pairs),
        "commit_ms": 1e3 * statistics.median(commit for commit, _ in pairs),
        "write_ms": 1e3 * statistics.median(write for _, write in pairs),
    }


def _seconds(way: Callable[[], object]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _write(folder: Path, name: str, content: bytes, receipt: Receipt) -> None:
    """A bare write and fsync of a part and its receipt."""
    for path, data in ((folder / f"{name}.parquet", content), (folder / f"{name}.json", canonical_json(receipt))):
        with path.open("xb") as file:
            for start in range(0, len(data), _BLOCK_BYTES):
                file.write(data[start : start + _BLOCK_BYTES])
            file.flush()
            os.fsync(file.fileno())


def _receipt(number: int, content: bytes) -> Receipt:
    return Receipt(
        part_id=f"{number:032x}",
        path=f"data/train/part-{number:05d}.parquet",
        split="train",
        fold=-1,
        slice="0" * 64,
        sha256=sha256_hex(content),
        num_bytes=len(content),
        num_sequences=1,
        num_labels=1,
        num_head_entries=1,
        num_tail_entries=1,
        label_logprob_sum=-1.0,
        fidelity=Fidelity(
            mean_squared_error=0.01,
            gradient_angle_degrees=10.0,
            mean_kl_nats=None,
            mean_entries=12.0,
            mass_by_rank=None,
            num_ranked=0,
        ),
    )


def _two_workers(options: Options) -> dict[str, Any]:
    num_parts, repeats = (4, 1) if options.quick else (24, 5)
    with open_sides(options.cache, num_parts=num_parts) as sides:
        say(f"two workers and two processes: {num_parts} parts, {repeats} turns each")
        one, other = (_parts(targets) for targets in (sides.workers(), sides.processes()))
        require(len(one) == num_parts and one == other, "workers and bare processes make the same bytes")
        seconds = interleaved({"workers": sides.workers, "processes": sides.processes}, repeats=repeats)
    return {"num_parts": num_parts, "repeats": repeats, **{f"{name}_seconds": s for name, s in seconds.items()}}


def _parts(targets: str) -> dict[str, str]:
    store = LocalStore(targets)
    return {path: sha256_hex(store.read(path)) for path in store.list("data")}


def measure(options: Options) -> Result:
    few, many = (100, 500) if options.quick else (1_000, 20_000)
    repeats = 15 if options.quick else 100
    two = _two_workers(options)
    commits = {name: _commit_over_write(size, repeats=repeats) for name, size in _SIZES.items()}
    say_table(
        ("a commit and a bare write of", "commit", "write", "ratio"),
        [(n, f"{c['commit_ms']:.2f} ms", f"{c['write_ms']:.2f} ms", f"{c['ratio']:.2f}") for n, c in commits.items()],
    )
    answered = _measure_no_op("answer", many)
    small, large = (_measure_no_op("commit", num_parts) for num_parts in (few, many))
    rows = {"nothing committed": answered, "committed": small, "committed ": large}
    say_table(
        ("no-op teacher", "parts", "a part", "client", "scheduler", "client", "scheduler"),
        [
            (
                name,
                f"{no_op.num_parts:,}",
                f"{no_op.ms_per_part:.2f} ms",
                f"{no_op.client_cpu_ms:.2f} ms",
                f"{no_op.scheduler_cpu_ms:.2f} ms",
                f"{no_op.client_mib:.0f} MiB",
                f"{no_op.scheduler_mib:.0f} MiB",
            )
            for name, no_op in rows.items()
        ],
    )
    figures = {
        "scheduling_ms_per_part": answered.client_cpu_ms + answered.scheduler_cpu_ms,
        "commit_over_write": commits["3 MB"]["ratio"],
        "client_memory_ratio": large.client_mib / small.client_mib,
        "two_workers_over_two_processes": two["processes_seconds"] / two["workers_seconds"],
    }
    return Result(
        figures={name: round(value, 3) for name, value in figures.items()},
        details={
            "scheduler_memory_ratio": round(large.scheduler_mib / small.scheduler_mib, 3),
            "no_op": [_as_values(no_op) for no_op in (answered, small, large)],
            "commit": commits,
            "two_workers": two,
        },
    )


def _as_values(no_op: NoOp) -> dict[str, float]:
    return {name: round(getattr(no_op, name), 3) for name in NoOp.__slots__}
