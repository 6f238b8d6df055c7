"""Two workers of a cluster, and two bare processes, on the same slices with the same teacher; one thread each.

Both run the pipeline's own task, `score_part`, in processes with the same environment. Each bare process gets
half of the slices; they start at the same time, and the slower one counts. Models are loaded, and a first slice is
scored, before timing starts.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from softshard.cluster.cluster import WORKER_ENVIRONMENT, Cluster, open_cluster
from softshard.config import ClusterSettings, CorpusSettings, SourceSettings, TeacherSettings, ThresholdSketch
from softshard.corpus.build import build_corpus
from softshard.corpus.manifest import CorpusManifest, CorpusSlice
from softshard.errors import JobInvalid
from softshard.models import load_tokenizer, weights_digest
from softshard.stages.targets.parts import find_missing, score_parts
from softshard.stages.targets.tasks import FoldTeacher, ScoreTask, ScoringSpec, score_part
from softshard.storage import LocalStore
from softshard.teacher.engines import teacher_identity
from softshard.telemetry import SilentReporter

__all__ = ["Sides", "open_sides"]

_CONTEXT_TOKENS, _SEQUENCES_PER_PART = 256, 2
_WORKERS = 2


class Sides:
    """Both ways to score the same slices."""

    def __init__(self, run: ScoringSpec, slices: Sequence[CorpusSlice], cluster: Cluster, bare: Sequence[Any]) -> None:
        self._run, self._slices, self._cluster, self._bare = run, slices, cluster, bare
        self._turns = 0

    def warm_up(self) -> None:
        """Load the models, and score every slice once on each side."""
        self.workers()
        self.processes()

    def workers(self) -> str:
        """Score all slices on the cluster; where the parts are."""
        run = self._next_run()
        missing = find_missing(LocalStore(run.targets), run, self._slices)
        score_parts(self._cluster, run, missing, SilentReporter())
        return run.targets

    def processes(self) -> str:
        """Score all slices in the bare processes; where the parts are."""
        run = self._next_run()
        tasks = [
            ScoreTask(index=index, part_id=run.part_spec(index, part).part_id, slice=part)
            for index, part in enumerate(self._slices)
        ]
        for number, connection in enumerate(self._bare):
            connection.send((run, tasks[number::_WORKERS]))
        for connection in self._bare:
            connection.recv()
        return run.targets

    def _next_run(self) -> ScoringSpec:
        self._turns += 1
        return replace(self._run, targets=f"{self._run.targets}-{self._turns}")


def _serve(connection: Any) -> None:
    """A bare process: scores what it is sent."""
    while (work := connection.recv()) is not None:
        run, tasks = work
        for task in tasks:
            score_part(task, spec=run)
        connection.send(None)


@contextmanager
def open_sides(cache: Path, *, num_parts: int) -> Iterator[Sides]:
    """Both sides, on slices of real prose and the small model of the benchmarks."""
    model, text = cache / "SmolLM2-135M-Instruct", cache / "speeches.jsonl"
    if not (model.is_dir() and text.is_file()):
        problem = "is not there; run `python jobs/materials.py benchmarks` first"
        raise JobInvalid(file=str(text if model.is_dir() else model), place="", problem=problem)
    with tempfile.TemporaryDirectory(dir=".", prefix=".scale-") as scratch:
        folder = Path(scratch).absolute()
        corpus = _corpus(folder, model, text)
        run = _run(folder, model, corpus)
        with open_cluster(ClusterSettings(workers=_WORKERS)) as cluster, _bare_processes() as bare:
            # Slices of one size, so that half of them is half of the work.
            full = [part for part in corpus.slices if part.num_sequences == _SEQUENCES_PER_PART]
            assert len(full) >= num_parts
            yield Sides(run, full[:num_parts], cluster, bare)


def _corpus(folder: Path, model: Path, text: Path) -> CorpusManifest:
    source = SourceSettings(
        name="speeches",
        uri=str(text),
        style="spoken",
        license="CC0-1.0",
        rights_basis="public-domain",
        max_documents=80,
    )
    settings = CorpusSettings(
        sources=(source,),
        holdout_fraction=0,
        context_tokens=_CONTEXT_TOKENS,
        overlap_tokens=32,
        sequences_per_part=_SEQUENCES_PER_PART,
    )
    store, reporter = LocalStore(folder / "corpus"), SilentReporter()
    return build_corpus(
        settings=settings, tokenizer=load_tokenizer(model), folds=0, seed=0, store=store, reporter=reporter
    )


def _run(folder: Path, model: Path, corpus: CorpusManifest) -> ScoringSpec:
    settings = TeacherSettings(model=str(model), folds=0, device="cpu", num_threads=1)
    identity = teacher_identity(settings, context_tokens=_CONTEXT_TOKENS, weights=weights_digest(model), adapters=())
    return ScoringSpec(
        corpus=str(folder / "corpus"),
        targets=str(folder / "targets"),
        teacher=str(folder / "teacher"),
        model=model,
        device="cpu",
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        teachers={-1: FoldTeacher(identity=identity, adapters=())},
        sketch=ThresholdSketch(),
        seed=0,
    )


@contextmanager
def _bare_processes() -> Iterator[list[Any]]:
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(_WORKERS)]
    processes = [spawn.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in WORKER_ENVIRONMENT.items()})
    for process in processes:
        process.start()
    os.environ.clear()
    os.environ.update(before)
    try:
        yield [ours for ours, _ in pairs]
        for ours, _ in pairs:
            ours.send(None)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
