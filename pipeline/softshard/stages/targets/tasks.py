"""The targets stage's work on a worker: scoring one slice of the corpus and committing it as a part.

A worker keeps its last engine, so consecutive parts of one fold load it once.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from softshard.config import SketchSettings
from softshard.corpus.manifest import CorpusSlice
from softshard.corpus.read import read_slice
from softshard.errors import DeviceFailed, EngineFailed, EngineNotOpened, full_disk
from softshard.models import device_failed, out_of_memory
from softshard.records.digest import canonical_digest
from softshard.shard.commit import PartSpec, build_part, commit_part, find_receipt
from softshard.shard.manifest import Receipt
from softshard.shard.schema import SCHEMA_VERSION
from softshard.storage import open_store
from softshard.teacher.protocol import Teacher, TeacherIdentity
from softshard.teacher.record import AdapterReceipt

__all__ = ["FoldTeacher", "ScoreTask", "ScoringSpec", "load_teacher", "score_part"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTeacher:
    """The teacher that scores one fold."""

    identity: TeacherIdentity
    adapters: tuple[AdapterReceipt, ...]
    """One adapter, several that are averaged, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpec:
    """What all parts of a run share; it is sent to a worker with each task."""

    corpus: str
    """The `corpus/` folder."""
    targets: str
    """The `targets/` folder."""
    teacher: str
    """The `teacher/` folder."""
    model: Path
    device: str
    tokenizer_fingerprint: str
    vocab_size: int
    teachers: dict[int, FoldTeacher]
    """By fold; -1 is the hold-out."""
    sketch: SketchSettings
    seed: int
    schema_version: int = SCHEMA_VERSION

    def part_spec(self, index: int, part: CorpusSlice) -> PartSpec:
        """The part that a slice becomes; `index` is the slice's place in the corpus."""
        return PartSpec(
            index=index,
            split=part.split,
            fold=part.fold,
            slice=part.sha256,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            teacher=self.teachers[part.fold].identity,
            sketch=self.sketch,
            seed=self.seed,
            schema_version=self.schema_version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTask:
    """One part to compute."""

    index: int
    """Place of its slice in the corpus."""
    part_id: str
    slice: CorpusSlice


_engine: tuple[str, Teacher] | None = None


def score_part(task: ScoreTask, *, spec: ScoringSpec) -> Receipt:
    """Score a slice of the corpus and commit the part; returns the receipt of a part that is committed already.

    Raises:
        EngineFailed: the engine failed or ran out of memory.
        EngineNotOpened, DeviceFailed: the fault is this process's.
        EngineDiffers: the engine is not of the version that the spec names.
    """
    targets = open_store(spec.targets)
    receipt = find_receipt(targets, task.part_id)
    if receipt is not None:
        return receipt
    part = spec.part_spec(task.index, task.slice)
    sequences = read_slice(open_store(spec.corpus), task.slice)
    try:
        scored, fidelity = load_teacher(spec, fold=part.fold).score(sequences, sketch=part.sketch, seed=part.seed)
    except EngineFailed:
        _forget_teacher()
        raise
    except (RuntimeError, MemoryError) as error:
        if device_failed(error):
            with suppress(RuntimeError):
                _forget_teacher()
            raise DeviceFailed(device=str(part.teacher["device"]), problem=str(error)) from error
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        _forget_teacher()
        problem = f"memory ran out ({error}), give the worker more, or lower teacher.batch_tokens"
        raise EngineFailed(engine=str(part.teacher["engine"]), problem=problem) from error
    content, receipt = build_part(part, list(zip(sequences, scored, strict=True)), fidelity)
    return commit_part(targets, content, receipt)


def load_teacher(spec: ScoringSpec, *, fold: int) -> Teacher:
    """The engine of a fold, loaded unless it is the last one that was used here.

    Raises EngineNotOpened, and as `open_teacher`.
    """
    global _engine
    fold_teacher = spec.teachers[fold]
    key = canonical_digest([fold_teacher.identity, str(spec.model), spec.teacher])
    if _engine is None or _engine[0] != key:
        from softshard.teacher.engines import open_teacher

        _forget_teacher()
        store = open_store(spec.teacher)
        folders = [store.local_folder(receipt.folder, receipt.weight_files) for receipt in fold_teacher.adapters]
        with _opening(str(fold_teacher.identity["engine"])):
            teacher = open_teacher(
                spec.model,
                adapters=folders,
                identity=fold_teacher.identity,
                device=spec.device,
                vocab_size=spec.vocab_size,
            )
        _engine = (key, teacher)
    return _engine[1]


@contextmanager
def _opening(engine: str) -> Iterator[None]:
    """Errors that are neither the job's nor the model's become EngineNotOpened: another process may open the engine."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError, DeviceFailed) as error:
        if full_disk(error) is not None:
            raise
        traceback.clear_frames(error.__traceback__)
        raise EngineNotOpened(engine=engine, problem=getattr(error, "problem", "") or str(error)) from error


def _forget_teacher() -> None:
    global _engine
    if _engine is not None:
        last, _engine = _engine[1], None
        last.close()
