"""Fault drills through the command line, on Dask's own workers: what fails is named, tried again, and harms nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from fakes.tiny_decoders import FAMILIES, open_vllm
from softshard.cli import main
from softshard.cluster import cluster
from softshard.config.job_file import load_job
from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import EngineFailed, ModelInvalid
from softshard.models import load_model
from softshard.output.workspace import open_workspace
from softshard.stages.targets import tasks
from softshard.stages.targets.stage import make_scoring_spec
from softshard.stages.teacher.stage import StyleTeacher
from softshard.teacher import engines

pytestmark = pytest.mark.timeout(900)

PATIENCE = 400.0
"""Seconds; a busy machine takes a minute to open one engine in a process of its own."""


class Run:
    """`softshard targets` in a session of its own, so that every process that it starts can be told."""

    def __init__(self, job):
        self.receipts_folder = job.parent / "out/targets/receipts"
        self._errors = job.parent / "stderr"
        command = [sys.executable, "-m", "softshard.cli", "targets", str(job), "--quiet"]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)

    def wait(self):
        return self._process.wait(PATIENCE)

    @property
    def said(self):
        """Its own lines on stderr, without what vLLM and torch say there."""
        return [line for line in self._errors.read_text().splitlines() if line.startswith("softshard: ")]

    def receipts(self):
        return {path.stem for path in self.receipts_folder.glob("*.json")}

    def worker(self):
        """The Dask worker; None before it is there."""
        return spawned_by(psutil.Process(self._process.pid), "dask worker")

    def engine(self, *, after=()):
        """The engine's process, ready or not, if there is one that is none of some others."""
        worker = self.worker()
        return worker and spawned_by(worker, "VLLM", but=after)

    def left_behind(self):
        """What it started and did not end, a few seconds after its own end."""
        end = time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def _processes(self):
        return [process for process in psutil.process_iter() if session_of(process) == self._process.pid]

    def until(self, found):
        """What `found` gives, once it gives something."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self._process.poll() is None, f"the run ended early: {self.said}"
            result = found()
            if result:
                return result
            time.sleep(0.01)
        raise TimeoutError(self._errors.read_text()[-2000:])

    def kill_in_the_middle_of_a_part(self, engine):
        """Kill an engine that has a part in hand: it is held first, until what was done before is committed."""
        engine.suspend()
        seen: set[str] = set()
        while (now := self.receipts()) != seen:
            seen = now
            time.sleep(0.5)
        engine.kill()

    def end(self):
        for process in self._processes():
            process.kill()
        self._process.wait()


def spawned_by(parent, title, *, but=()):
    """A child that has the title, or is about to give itself one."""
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            if child.pid not in but and (command.startswith(title) or "spawn_main" in command):
                return child
    return None


def session_of(process):
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


@pytest.fixture
def start():
    runs = []

    def begin(job):
        runs.append(Run(job))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def committed(job):
    """Every committed file: its bytes, when it was written, and that it is the same file."""
    folder = job.parent / "out/targets"
    files = [*folder.glob("data/**/*.parquet"), *folder.glob("receipts/*")]
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in files
    }


def test_a_killed_engine_costs_no_part_until_all_attempts_are_used_up(tiny_job, tmp_path, start, capsys):
    options = {"own_process": True, "kv_cache_gib": 0.25, "max_num_seqs": 1, "max_num_batched_tokens": 1}
    job = tiny_job(
        tmp_path,
        corpus={"sequences_per_part": 64},
        teacher={"folds": 0, "engine": "vllm", "vllm": options},
        cluster={"max_attempts": 2},
    )
    assert main(["corpus", str(job), "--quiet"]) == 0
    assert len(json.loads((tmp_path / "out/corpus/manifest.json").read_text())["slices"]) == 3

    run = start(job)
    # The first part is committed, and the engine dies with the second in hand.
    engine = run.until(run.engine)
    run.until(run.receipts)
    run.kill_in_the_middle_of_a_part(engine)
    first = committed(job)
    assert len(run.receipts()) == 1
    # The engine that is opened for the third part dies as well.
    second = run.until(lambda: run.engine(after={engine.pid}))
    second.kill()
    # The next one scores the second part again, and dies with the third in hand.
    third = run.until(lambda: run.engine(after={engine.pid, second.pid}))
    run.until(lambda: len(run.receipts()) == 2)
    run.kill_in_the_middle_of_a_part(third)
    assert run.wait() == 3
    (line,) = run.said
    (named,) = re.findall(r"part-([0-9a-f]{32}): EngineFailed: [^:]*: its process was killed", line)
    assert "(attempt 2)" in line
    assert named not in (before := run.receipts())
    assert not (tmp_path / "out/targets/manifest.json").exists()
    kept = committed(job)
    assert kept.items() > first.items()
    assert run.left_behind() == []

    again = start(job)
    assert again.wait() == 0, again.said
    assert again.receipts() == {*before, named}
    assert committed(job).items() > kept.items()
    assert again.left_behind() == []
    assert main(["verify", str(tmp_path / "out"), "--deep", "--quiet"]) == 0, capsys.readouterr().err


def test_an_engine_whose_worker_is_killed_ends_and_its_part_is_scored_by_the_next(tiny_job, tmp_path, start):
    options = {"own_process": True, "kv_cache_gib": 0.25, "max_num_seqs": 1, "max_num_batched_tokens": 1}
    job = tiny_job(tmp_path, teacher={"folds": 0, "engine": "vllm", "vllm": options})
    assert main(["corpus", str(job), "--quiet"]) == 0
    run = start(job)
    engine = run.until(run.engine)
    run.until(run.receipts)
    run.worker().kill()
    engine.wait(timeout=60)
    assert run.wait() == 0, run.said
    assert len(run.receipts()) == len(json.loads((tmp_path / "out/corpus/manifest.json").read_text())["slices"])
    assert run.left_behind() == []


@pytest.fixture
def wide_model(tiny_model, tmp_path):
    """A decoder with wide logits, 1 MiB a position; most of them stand for no token."""
    torch.manual_seed(0)
    shape = {**FAMILIES["Qwen2"], "vocab_size": 2**18, "max_position_embeddings": 4096}
    AutoModelForCausalLM.from_config(transformers.Qwen2Config(**shape)).save_pretrained(tmp_path / "wide")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "wide" / file.name)
    return tmp_path / "wide"


def one_long_document(texts, path):
    """A source of 20 documents of about 120 tokens, and one of 1,960."""
    documents = [f"{texts[index % 12]} {texts[index // 3]}" for index in range(20)]
    words = " ".join(texts * 4).split()
    documents.append(" ".join(f"{word}{index % 9}" for index, word in enumerate(words))[:2900])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    terms = {"style": "literary", "license": "CC0-1.0", "rights_basis": "owned"}
    return {"name": "tales", "uri": str(path), **terms}


def test_a_sequence_too_long_for_the_memory_is_set_aside_and_the_others_are_scored(
    tiny_job, wide_model, texts, tmp_path, start, capsys
):
    options = {"kv_cache_gib": 0.25, "max_num_batched_tokens": 4096, "chunk_rows": 4096}
    source = one_long_document(texts, tmp_path / "tales.jsonl")
    job = tiny_job(
        tmp_path,
        corpus={"sources": [source], "sequences_per_part": 1, "context_tokens": 2048},
        teacher={"folds": 0, "engine": "vllm", "model": str(wide_model), "vllm": options},
        cluster={"max_attempts": 2},
    )
    assert main(["corpus", str(job), "--quiet"]) == 0
    slices = json.loads((tmp_path / "out/corpus/manifest.json").read_text())["slices"]
    labels = [part["num_labels"] for part in slices]
    assert labels.index(max(labels)) > 5  # it is scored when memory has become scarce

    run = start(job)
    worker = run.until(run.worker)
    run.until(run.receipts)
    # One engine more, of a few hundred MiB, is to fit in; 1,900 MiB of logits are not.
    limit = worker.memory_info().vms + 1600 * 2**20
    worker.rlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    assert run.wait() == 3
    (line,) = run.said
    assert "1 task(s) were set aside" in line
    (named,) = re.findall(r"part-([0-9a-f]{32}): EngineFailed: .*memory ran out .*can't allocate memory", line)
    assert "(attempt 2)" in line
    assert "teacher.vllm.chunk_rows" in line
    assert len(run.receipts()) == len(slices) - 1
    assert named not in run.receipts()
    assert not (tmp_path / "out/targets/manifest.json").exists()
    assert run.left_behind() == []


class Exhausted:
    """An engine that asks torch, or numpy, for more memory than any machine has."""

    closed = False

    def __init__(self, ask):
        self._ask = ask

    def score(self, *_, **__):
        self._ask(2**50)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("ask", [torch.empty, np.empty])
def test_memory_that_runs_out_in_any_engine_may_be_there_for_the_next(tiny_job, tmp_path, monkeypatch, ask):
    job = load_job(tiny_job(tmp_path, teacher={"folds": 0}))
    assert main(["corpus", str(tmp_path / "job.yaml"), "--quiet"]) == 0
    workspace = open_workspace(job)
    corpus = read_corpus_manifest(workspace.corpus)
    scoring = make_scoring_spec(workspace, corpus, StyleTeacher(adapters=()))
    part = corpus.slices[0]
    task = tasks.ScoreTask(index=0, part_id=scoring.part_spec(0, part).part_id, slice=part)
    engine = Exhausted(ask)
    monkeypatch.setattr(engines, "open_teacher", lambda *_, **__: engine)
    with pytest.raises(EngineFailed, match="the transformers engine failed: memory ran out"):
        tasks.score_part(task, spec=scoring)
    assert engine.closed
    assert committed(tmp_path / "job.yaml") == {}


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """The tiny model in several files, and the names of these."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return folder, shards


def remove(shard):
    shard.unlink()
    return f"the shard {shard.name}, which model.safetensors.index.json names, is missing"


def cut(shard):
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return f"{shard.name} is cut off"


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("harm", [remove, cut])
def test_a_model_with_a_broken_shard_is_refused_before_an_engine_starts(
    tiny_job, sharded, tmp_path, capsys, monkeypatch, engine, harm
):
    folder, shards = sharded
    problem = harm(shards[1])
    job = tiny_job(tmp_path, teacher={"folds": 0, "engine": engine, "model": str(folder)})
    assert main(["corpus", str(job), "--quiet"]) == 0
    capsys.readouterr()
    monkeypatch.delattr(cluster, "open_cluster")
    assert main(["targets", str(job), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"softshard: {folder}: {problem}")
    assert committed(job) == {}


@pytest.mark.parametrize("harm", [remove, cut])
def test_a_worker_whose_copy_of_the_model_is_broken_says_so(sharded, harm):
    folder, shards = sharded
    problem = harm(shards[1])
    with pytest.raises(ModelInvalid, match=re.escape(f"{folder}: {problem}")):
        open_vllm(folder)
    with pytest.raises(ModelInvalid, match=re.escape(f"{folder}: {problem}")):
        load_model(folder, dtype=torch.float32, device="cpu")
