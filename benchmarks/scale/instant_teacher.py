"""A run of N parts with a teacher that answers at once: the work of client, scheduler and workers without a model.

In: a number of parts. Out: seconds, CPU seconds and peak memory of a client in a separate process. The corpus is only a
manifest; no slice of it is read. The client does what the targets stage does: it reads that manifest, finds the missing
parts, has them scored on a cluster, reads the receipts, and writes the manifest and the card. Only the function that
runs on a worker differs:

- `answer` returns a receipt and commits nothing, so that only the round trip of a task is measured;
- `commit` builds a part of two short sequences, whose sketches are ready-made, and commits it like any other part.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from softshard.cluster.cluster import open_cluster
from softshard.config import ClusterSettings, ThresholdSketch
from softshard.corpus.manifest import (
    CORPUS_VERSION,
    CorpusManifest,
    CorpusSlice,
    read_corpus_manifest,
    write_corpus_manifest,
)
from softshard.records.spool import Spool
from softshard.shard.card import write_card
from softshard.shard.commit import build_part, commit_part
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.shard.schema import SCHEMA_VERSION
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.philox import tail_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.stages.targets.parts import committed, find_missing, score_parts
from softshard.stages.targets.tasks import FoldTeacher, ScoreTask, ScoringSpec
from softshard.storage import LocalStore, open_store
from softshard.telemetry import EventValue, SilentReporter

__all__ = ["answer", "commit", "main", "peak_mib", "write_corpus"]

_VOCAB, _TOKENS, _SEQUENCES = 1_000, 33, 2
_SKETCH = ThresholdSketch()


def write_corpus(folder: Path, num_parts: int) -> None:
    """The manifest of a corpus of so many slices, in `folder/corpus`."""
    slices = Spool(CorpusSlice)
    for index in range(num_parts):
        sha256 = f"{index:064x}"
        slices.append(
            CorpusSlice(
                path=f"sequences/train-all-{sha256[48:]}.parquet",
                split="train",
                fold=-1,
                sha256=sha256,
                num_documents=_SEQUENCES,
                num_sequences=_SEQUENCES,
                num_labels=_SEQUENCES * (_TOKENS - 1),
                num_tokens=_SEQUENCES * _TOKENS,
                num_bytes_text=100,
            )
        )
    manifest = CorpusManifest(
        schema_version=CORPUS_VERSION,
        key="0" * 64,
        tokenizer_fingerprint="0" * 64,
        vocab_size=_VOCAB,
        context_tokens=_TOKENS,
        overlap_tokens=1,
        folds=0,
        seed=0,
        sources=(),
        counts={"kept": num_parts},
        train_digests=(),
        slices=slices,
        documents=(),
        statistics=(),
    )
    write_corpus_manifest(LocalStore(folder / "corpus"), manifest)


@functools.cache
def _rows() -> tuple[list[tuple[TokenSequence, SequenceTargets]], FidelitySums]:
    """Two short sequences with their sketches: the same in every part."""
    generator = torch.Generator().manual_seed(0)
    rows, total = [], FidelitySums()
    for index in range(_SEQUENCES):
        sequence = TokenSequence(
            sequence_id=f"{index:032x}",
            document_id=f"{index:032x}",
            source="none",
            style="none",
            group="none",
            start=0,
            token_ids=torch.randint(0, _VOCAB, (_TOKENS,), generator=generator).numpy().astype(np.int32),
            label_spans=((1, _TOKENS),),
        )
        targets, sums = sketch_rows(
            3 * torch.randn(sequence.num_labels, _VOCAB, generator=generator),
            labels=torch.from_numpy(sequence.labels.astype(np.int64)),
            uniforms=tail_uniforms([sequence], seed=0, draws=1),
            settings=_SKETCH,
            vocab_size=_VOCAB,
            places=[(sequence.sequence_id, position) for position in range(sequence.num_labels)],
        )
        rows.append((sequence, targets))
        total += sums
    return rows, total


def _build(task: ScoreTask, spec: ScoringSpec) -> tuple[bytes, Receipt]:
    rows, sums = _rows()
    return build_part(spec.part_spec(task.index, task.slice), rows, sums)


_first: Receipt | None = None


def answer(task: ScoreTask, *, spec: ScoringSpec) -> Receipt:
    """A receipt, of a part that is not there."""
    global _first
    _first = _first or _build(task, spec)[1]
    return _first.model_copy(update={"part_id": task.part_id})


def commit(task: ScoreTask, *, spec: ScoringSpec) -> Receipt:
    """Build and commit a part."""
    content, receipt = _build(task, spec)
    return commit_part(open_store(spec.targets), content, receipt)


def peak_mib(process: int | str = "self") -> float:
    """Most memory that a process has had at one time."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/{process}/status has no VmHWM")


def _run_of(folder: Path, corpus: CorpusManifest) -> ScoringSpec:
    return ScoringSpec(
        corpus=str(folder / "corpus"),
        targets=str(folder / "targets"),
        teacher=str(folder / "teacher"),
        model=folder,
        device="cpu",
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        teachers={-1: FoldTeacher(identity={"engine": "none"}, adapters=())},
        sketch=_SKETCH,
        seed=0,
    )


def _publish(corpus: CorpusManifest, run: ScoringSpec) -> None:
    """What `ensure_targets` does once all parts are committed."""
    store = LocalStore(run.targets)
    receipts = Spool(Receipt, committed(store, run, corpus.slices))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        job="scale",
        corpus=corpus.digest,
        sources=corpus.sources,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        context_tokens=corpus.context_tokens,
        overlap_tokens=corpus.overlap_tokens,
        target=run.sketch.model_dump(mode="json"),
        seed=run.seed,
        teacher={"engine": "none"},
        fidelity=mean_fidelity(receipts),
        bytes_per_position=bytes_per_position(receipts),
        parts=receipts,
    )
    write_manifest(store, manifest)
    write_card(store, manifest)


class _Counter(SilentReporter):
    """Counts the parts that it is told of."""

    def __init__(self) -> None:
        self.num_parts = 0

    def event(self, name: str, /, **values: EventValue) -> None:
        self.num_parts += name == "part_committed"


def main(folder: Path, scheduler_file: str, function: str) -> None:
    """One run, in this process; a warm-up of the same kind goes before it."""
    score = {"answer": answer, "commit": commit}[function]
    counter = _Counter()
    with open_cluster(ClusterSettings(scheduler_file=scheduler_file)) as cluster:
        for name, reporter in (("warm-up", SilentReporter()), ("run", counter)):
            corpus = read_corpus_manifest(LocalStore(folder / name / "corpus"))
            assert corpus is not None
            run = _run_of(folder / name, corpus)
            begun, cpu_begun = time.perf_counter(), time.process_time()
            score_parts(cluster, run, find_missing(LocalStore(run.targets), run, corpus.slices), reporter, score=score)
            seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
            if function == "commit":
                _publish(corpus, run)
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib(), "num_parts": counter.num_parts}
    print(json.dumps(figures))


if __name__ == "__main__":
    from benchmarks.scale import instant_teacher

    # Workers import functions by the module's name; those of a program belong to `__main__`, which they lack.
    instant_teacher.main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
