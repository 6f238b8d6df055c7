"""The teacher stage's work on a worker: training and saving the adapter of one fold."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from softshard.cluster.worker import send_message
from softshard.corpus.manifest import read_corpus_manifest
from softshard.corpus.read import read_slice
from softshard.errors import PartCorrupt
from softshard.finetune.loop import Step
from softshard.models import release_memory, resolve_device
from softshard.sketch.types import TokenSequence
from softshard.storage import open_store
from softshard.teacher.documents import DOCUMENTS_FILE, TrainedDocuments, decode_documents, encode_documents
from softshard.teacher.record import AdapterReceipt
from softshard.teacher.style import FoldSpec, train_fold

__all__ = ["FoldTask", "train_adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldTask:
    """One adapter to train."""

    spec: FoldSpec
    corpus: str
    """The `corpus/` folder."""
    teacher: str
    """The `teacher/` folder."""
    model: Path
    device: str
    as_listed: bool = False
    """Train on the documents that the list in the adapter's folder names, instead of all outside the fold."""


def train_adapter(task: FoldTask) -> AdapterReceipt:
    """Train the adapter of a fold on the documents outside it; sends its progress to the client."""
    last = 0.0

    def report_step(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.5 or step.step == step.total_steps:
            last = now
            send_message({"fold": task.spec.fold, "step": step.step, "steps": step.total_steps, "loss": step.loss})

    sequences, documents = _listed(task) if task.as_listed else _outside(task)
    if documents.digests(task.spec.other_folds) != task.spec.documents:
        problem = f"has changed since the training of {task.spec.folder} was requested; run the job again"
        raise PartCorrupt(uri=f"{task.corpus}/manifest.json", problem=problem)
    receipt = train_fold(
        task.spec,
        sequences,
        documents=_document_list(task, documents),
        folder=task.model,
        device=task.device,
        store=open_store(task.teacher),
        on_step=report_step,
    )
    release_memory(resolve_device(task.device))
    return receipt


def _document_list(task: FoldTask, documents: TrainedDocuments) -> bytes:
    """The list of the documents as a file; the stored file where it names the same, as Parquet writers differ."""
    store, path = open_store(task.teacher), f"{task.spec.folder}/{DOCUMENTS_FILE}"
    try:
        content = store.read(path)
        listed = decode_documents(content, uri=f"{store.uri}/{path}")
        if listed.digests(task.spec.other_folds) == task.spec.documents:
            return content
    except (FileNotFoundError, PartCorrupt):
        pass
    return encode_documents(documents)


def _outside(task: FoldTask) -> tuple[list[TokenSequence], TrainedDocuments]:
    """The sequences of the train documents outside the fold, and these documents. Raises PartCorrupt."""
    store = open_store(task.corpus)
    manifest = read_corpus_manifest(store)
    sequences: list[TokenSequence] = []
    ids: dict[int, bytearray] = {}
    for part in manifest.slices if manifest else ():
        if part.split == "train" and part.fold != task.spec.fold:
            found = read_slice(store, part)
            sequences += found
            firsts = (sequence.document_id for sequence in found if sequence.start == 0)
            ids.setdefault(part.fold, bytearray()).extend(b"".join(map(bytes.fromhex, firsts)))
    return sequences, TrainedDocuments({fold: bytes(packed) for fold, packed in ids.items()})


def _listed(task: FoldTask) -> tuple[list[TokenSequence], TrainedDocuments]:
    """The sequences of the documents that the adapter's list names, in its order, and these documents.

    Raises:
        PartCorrupt: the list cannot be read, or the corpus lacks one of its documents.
    """
    path = f"{task.spec.folder}/{DOCUMENTS_FILE}"
    store = open_store(task.teacher)
    documents = decode_documents(store.read(path), uri=f"{store.uri}/{path}")
    places = {document_id: place for place, document_id in enumerate(documents.in_order())}
    sequences = [sequence for sequence in _outside(task)[0] if sequence.document_id in places]
    if sum(sequence.start == 0 for sequence in sequences) != len(documents):
        problem = "names documents that the corpus does not have outside the fold"
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=problem)
    return sorted(sequences, key=lambda sequence: places[sequence.document_id]), documents
