"""What runs on a worker: one part scored and committed, or one adapter trained.

A worker keeps the engine that it used last, so parts of one fold that follow each other load it once.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from softshard.config import SketchSettings, digest_of
from softshard.corpus.manifest import CorpusSlice, read_corpus_manifest
from softshard.corpus.read import read_slice
from softshard.errors import EngineFailed, PartCorrupt
from softshard.models import out_of_memory, release_memory, resolve_device
from softshard.run.worker import send_message
from softshard.shard.commit import PartPlan, build_part, commit_part, find_receipt
from softshard.shard.manifest import Receipt
from softshard.storage import open_store
from softshard.target.types import TokenSequence
from softshard.teacher.documents import DOCUMENTS_FILE, TrainedDocuments, decode_documents, encode_documents
from softshard.teacher.protocol import Teacher, TeacherIdentity
from softshard.teacher.record import AdapterReceipt
from softshard.teacher.style import FoldPlan, train_fold
from softshard.train.loop import Step

__all__ = ["FoldTask", "FoldTeacher", "ScoreRun", "ScoreTask", "load_teacher", "score_part", "train_adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTeacher:
    """Who scores one fold."""

    identity: TeacherIdentity
    adapters: tuple[AdapterReceipt, ...]
    """One adapter, several that are averaged, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRun:
    """What all parts of a run share; a worker is sent it with each."""

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
    """By fold; -1: of the hold-out."""
    sketch: SketchSettings
    seed: int

    def plan(self, index: int, part: CorpusSlice) -> PartPlan:
        """The part that a slice becomes; `index` is the slice's place in the corpus."""
        return PartPlan(
            index=index,
            split=part.split,
            fold=part.fold,
            slice=part.sha256,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            teacher=self.teachers[part.fold].identity,
            sketch=self.sketch,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTask:
    """One part to compute."""

    index: int
    """Place of its slice in the corpus."""
    part_id: str
    slice: CorpusSlice


_engine: tuple[str, Teacher] | None = None


def score_part(task: ScoreTask, *, run: ScoreRun) -> Receipt:
    """Score a slice of the corpus and commit the part, unless that has been done."""
    targets = open_store(run.targets)
    receipt = find_receipt(targets, task.part_id)
    if receipt is not None:
        return receipt
    plan = run.plan(task.index, task.slice)
    sequences = read_slice(open_store(run.corpus), task.slice)
    try:
        scored, fidelity = load_teacher(run, fold=plan.fold).score(sequences, sketch=plan.sketch, seed=plan.seed)
    except EngineFailed:
        _forget_teacher()
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        _forget_teacher()
        problem = f"memory ran out ({error}), give the worker more, or lower teacher.batch_tokens"
        raise EngineFailed(engine=str(plan.teacher["engine"]), problem=problem) from error
    content, receipt = build_part(plan, list(zip(sequences, scored, strict=True)), fidelity)
    return commit_part(targets, content, receipt)


def load_teacher(run: ScoreRun, *, fold: int) -> Teacher:
    """The engine of a fold; that of the last part where it is the same. Raises EngineDiffers."""
    global _engine
    scorer = run.teachers[fold]
    key = digest_of([scorer.identity, str(run.model), run.teacher])
    if _engine is None or _engine[0] != key:
        from softshard.teacher.engines import open_teacher

        _forget_teacher()
        store = open_store(run.teacher)
        teacher = open_teacher(
            run.model,
            adapters=[store.local_folder(receipt.folder, receipt.weight_files) for receipt in scorer.adapters],
            identity=scorer.identity,
            device=run.device,
            vocab_size=run.vocab_size,
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
    """The `corpus/` folder."""
    teacher: str
    """The `teacher/` folder."""
    model: Path
    device: str
    as_listed: bool = False
    """Train on the documents that the list in the adapter's folder names, and not on all outside the fold."""


def train_adapter(task: FoldTask) -> AdapterReceipt:
    """Train the adapter of a fold on the documents outside it, telling the client how far it is."""
    last = 0.0

    def tell(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.5 or step.step == step.total_steps:
            last = now
            send_message({"fold": task.plan.fold, "step": step.step, "steps": step.total_steps, "loss": step.loss})

    sequences, documents = _listed(task) if task.as_listed else _outside(task)
    if documents.digests(task.plan.other_folds) != task.plan.documents:
        problem = f"is not the corpus that {task.plan.folder} is to be trained on, and was changed meanwhile"
        raise PartCorrupt(uri=f"{task.corpus}/manifest.json", problem=problem)
    receipt = train_fold(
        task.plan,
        sequences,
        documents=_list_of(task, documents),
        folder=task.model,
        device=task.device,
        store=open_store(task.teacher),
        on_step=tell,
    )
    release_memory(resolve_device(task.device))
    return receipt


def _list_of(task: FoldTask, documents: TrainedDocuments) -> bytes:
    """The list of the documents, as a file: that which is there where it names them, whatever Parquet wrote it."""
    store, path = open_store(task.teacher), f"{task.plan.folder}/{DOCUMENTS_FILE}"
    try:
        content = store.read(path)
        listed = decode_documents(content, uri=f"{store.uri}/{path}")
        if listed.digests(task.plan.other_folds) == task.plan.documents:
            return content
    except (FileNotFoundError, PartCorrupt):
        pass
    return encode_documents(documents)


def _outside(task: FoldTask) -> tuple[list[TokenSequence], TrainedDocuments]:
    """Sequences of the train documents outside the fold, and these documents. Raises PartCorrupt."""
    store = open_store(task.corpus)
    manifest = read_corpus_manifest(store)
    sequences: list[TokenSequence] = []
    ids: dict[int, bytearray] = {}
    for part in manifest.slices if manifest else ():
        if part.split == "train" and part.fold != task.plan.fold:
            found = read_slice(store, part)
            sequences += found
            firsts = (sequence.document_id for sequence in found if sequence.start == 0)
            ids.setdefault(part.fold, bytearray()).extend(b"".join(map(bytes.fromhex, firsts)))
    return sequences, TrainedDocuments({fold: bytes(packed) for fold, packed in ids.items()})


def _listed(task: FoldTask) -> tuple[list[TokenSequence], TrainedDocuments]:
    """Sequences of the documents that the adapter's list names, in its order, and these documents.

    Raises:
        PartCorrupt: the list cannot be read, or the corpus lacks one of them.
    """
    path = f"{task.plan.folder}/{DOCUMENTS_FILE}"
    store = open_store(task.teacher)
    documents = decode_documents(store.read(path), uri=f"{store.uri}/{path}")
    places = {document_id: place for place, document_id in enumerate(documents.in_order())}
    there = [sequence for sequence in _outside(task)[0] if sequence.document_id in places]
    if sum(sequence.start == 0 for sequence in there) != len(documents):
        problem = "names documents that the corpus does not have outside the fold"
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=problem)
    return sorted(there, key=lambda sequence: places[sequence.document_id]), documents
