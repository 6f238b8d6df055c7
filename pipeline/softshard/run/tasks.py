"""What runs on a worker: one part scored and committed, or one adapter trained.

A worker keeps the engine that it used last, so parts of one fold that follow each other load it once.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from softshard.config import digest_of
from softshard.corpus.manifest import CorpusManifest, CorpusSlice
from softshard.corpus.read import iter_sequences, read_slice
from softshard.errors import EngineFailed
from softshard.models import out_of_memory
from softshard.run.cluster import send_message
from softshard.shard.commit import PartPlan, build_part, commit_part, find_receipt
from softshard.shard.manifest import Receipt
from softshard.storage import LocalStore
from softshard.teacher.protocol import Teacher
from softshard.teacher.style import AdapterReceipt, FoldPlan, train_fold
from softshard.train.loop import Step

__all__ = ["FoldTask", "ScoreTask", "load_teacher", "score_part", "train_adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTask:
    """One part to compute."""

    plan: PartPlan
    slice: CorpusSlice
    corpus: str
    """The `corpus/` folder."""
    targets: str
    """The `targets/` folder."""
    model: Path
    adapters: tuple[Path, ...]
    """One adapter, several that are averaged, or none."""
    device: str


_engine: tuple[str, Teacher] | None = None


def score_part(task: ScoreTask) -> Receipt:
    """Score a slice of the corpus and commit the part, unless that has been done."""
    targets = LocalStore(task.targets)
    receipt = find_receipt(targets, task.plan.part_id)
    if receipt is not None:
        return receipt
    sequences = read_slice(LocalStore(task.corpus), task.slice)
    try:
        scored, fidelity = load_teacher(task).score(sequences, sketch=task.plan.sketch, seed=task.plan.seed)
    except EngineFailed:
        _forget_teacher()
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        _forget_teacher()
        problem = f"memory ran out ({error}), give the worker more, or lower teacher.batch_tokens"
        raise EngineFailed(engine=str(task.plan.teacher["engine"]), problem=problem) from error
    content, receipt = build_part(task.plan, list(zip(sequences, scored, strict=True)), fidelity)
    return commit_part(targets, content, receipt)


def load_teacher(task: ScoreTask) -> Teacher:
    """The engine of a part; that of the last one where it is the same. Raises EngineDiffers."""
    global _engine
    key = digest_of([task.plan.teacher, str(task.model), [str(path) for path in task.adapters]])
    if _engine is None or _engine[0] != key:
        from softshard.teacher.engines import open_teacher

        _forget_teacher()
        teacher = open_teacher(
            task.model,
            adapters=task.adapters,
            identity=task.plan.teacher,
            device=task.device,
            vocab_size=task.plan.vocab_size,
        )
        _engine = (key, teacher)
    return _engine[1]


def _forget_teacher() -> None:
    global _engine
    if _engine is not None:
        last, _engine = _engine[1], None
        last.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTask:
    """One adapter to train."""

    plan: FoldPlan
    corpus: str
    manifest: CorpusManifest
    teacher: str
    """The `teacher/` folder."""
    model: Path
    device: str


def train_adapter(task: FoldTask) -> AdapterReceipt:
    """Train the adapter of a fold on the documents outside it, telling the client how far it is."""
    last = 0.0

    def tell(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.5 or step.step == step.total_steps:
            last = now
            send_message({"fold": task.plan.fold, "step": step.step, "steps": step.total_steps, "loss": step.loss})

    sequences = list(
        iter_sequences(LocalStore(task.corpus), task.manifest, split="train", folds_excluded=(task.plan.fold,))
    )
    return train_fold(
        task.plan, sequences, folder=task.model, device=task.device, store=LocalStore(task.teacher), on_step=tell
    )
