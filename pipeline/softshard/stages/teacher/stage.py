"""The teacher stage: a corpus in, the adapters of its folds out, kept from an earlier corpus or trained.

An adapter that was trained on this very corpus is preferred. Else one is kept that was trained in the same way on
documents that are all still outside its fold, if the text there has not grown by more than the job allows; so no
adapter knows text that the corpus no longer has, and none scores what it was trained on. Each fold is judged alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softshard.cluster.cluster import OpenCluster
from softshard.corpus.documents import train_documents_outside
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing, PartCorrupt, PartsFailed
from softshard.finetune.record import check_files
from softshard.models import check_vocabulary, output_size
from softshard.output.workspace import Workspace
from softshard.stages.teacher.tasks import FoldTask, train_adapter
from softshard.storage import Store
from softshard.teacher.documents import DOCUMENTS_FILE, TrainedDocuments, decode_documents
from softshard.teacher.record import AdapterReceipt, adapters_of_fold, find_adapter, parse_fold, read_adapter_digest
from softshard.teacher.style import FoldSpec, training_precision
from softshard.telemetry import Reporter

__all__ = ["StyleTeacher", "ensure_teacher", "named_teacher", "train_missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleTeacher:
    """The adapters of all folds, in order; none where the model is used as it is."""

    adapters: tuple[AdapterReceipt, ...]

    def of_fold(self, fold: int) -> tuple[AdapterReceipt, ...]:
        """Adapters that score a fold: its own, or all of them for the hold-out."""
        return self.adapters[fold : fold + 1] if fold >= 0 else self.adapters


def ensure_teacher(
    workspace: Workspace, corpus: CorpusManifest, reporter: Reporter, cluster: OpenCluster, *, compute: bool
) -> StyleTeacher:
    """The style teacher's adapters, kept where they will do and trained where they are missing.

    Raises:
        VocabularyMismatch: the teacher's model lacks logits for its tokenizer.
        ManifestMissing: an adapter is missing, and must not be trained.
        PartCorrupt: an adapter, or a list of documents, is not what its record names.
        PartsFailed: an adapter could not be trained.
    """
    store, model = workspace.teacher, workspace.teacher_model
    check_vocabulary(
        model=model.name, model_size=output_size(model.folder), data="its tokenizer", data_size=corpus.vocab_size
    )
    plans = _fold_plans(workspace, corpus)
    found = {plan.fold: find_adapter(store, plan.folder) for plan in plans}
    kept = {plan.fold: _find_kept(workspace, corpus, plan) for plan in plans if found[plan.fold] is None}
    found.update(kept)
    missing = [plan for plan in plans if found[plan.fold] is None]
    if missing and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing[0].folder}/receipt.json", stage="teacher")
    _tell_kept(workspace, corpus, [receipt for receipt in kept.values() if receipt is not None], reporter)
    if missing:
        found.update(_train_folds(workspace, missing, reporter, cluster))
    ready = (found[plan.fold] for plan in plans)
    return StyleTeacher(adapters=tuple(receipt for receipt in ready if receipt is not None))


def _find_kept(workspace: Workspace, corpus: CorpusManifest, plan: FoldSpec) -> AdapterReceipt | None:
    """Of the adapters that will do, the one with the most labels, ties by id. Raises PartCorrupt."""
    store, allowed = workspace.teacher, workspace.job.teacher.retrain_growth
    # Text that has shrunk lacks a document, whatever else came.
    candidates = [
        receipt
        for receipt in adapters_of_fold(store, plan.fold)
        if receipt.recipe == plan.recipe and 0 <= _growth(corpus, receipt) <= allowed
    ]
    for receipt in sorted(candidates, key=lambda one: (-one.num_labels, one.adapter_id)):
        try:
            trained = _read_list(store, receipt.folder)
            if _all_outside(workspace.corpus, corpus, trained, fold=plan.fold):
                check_files(store, receipt.folder, receipt.files)
                return receipt
        except FileNotFoundError:
            continue
    return None


def _growth(corpus: CorpusManifest, receipt: AdapterReceipt) -> float:
    """By what share of the labels that an adapter was trained on the text outside its fold has grown."""
    labels = sum(part.num_labels for part in corpus.slices if part.split == "train" and part.fold != receipt.fold)
    return labels / receipt.num_labels - 1


def _read_list(store: Store, folder: str) -> TrainedDocuments:
    path = f"{folder}/{DOCUMENTS_FILE}"
    return decode_documents(store.read(path), uri=f"{store.uri}/{path}")


def _all_outside(store: Store, corpus: CorpusManifest, trained: TrainedDocuments, *, fold: int) -> bool:
    """Whether all documents of a list are in the train split of a corpus, and in other folds than this one."""
    there = train_documents_outside(store, corpus.documents, fold=fold)
    return bool(trained.series().is_in(there.implode()).all())


def _tell_kept(
    workspace: Workspace, corpus: CorpusManifest, kept: Sequence[AdapterReceipt], reporter: Reporter
) -> None:
    if kept:
        growth = max(_growth(corpus, receipt) for receipt in kept)
        num, folds = len(kept), workspace.job.teacher.folds
        reporter.say(
            f"teacher: {'adapters' if num == folds else f'{num} of {folds} adapters'} of an earlier corpus kept, the"
            f" text outside their folds has grown by {100 * growth:.1f}%"
            f" (retrain_growth is {100 * workspace.job.teacher.retrain_growth:g}%)"
        )


def named_teacher(store: Store, digests: Sequence[str]) -> StyleTeacher:
    """The adapters that the manifest of some targets names, and not those that a run would choose now.

    Args:
        store: the `teacher/` folder.
        digests: of the adapters of all folds, in order; none where the model was used as it is.

    Raises:
        PartCorrupt: one is missing, or a receipt, or a file of one, is not what it was written as.
    """
    found = []
    for fold, digest in enumerate(digests):
        same = [receipt for receipt in adapters_of_fold(store, fold) if receipt.digest == digest]
        if not same or find_adapter(store, same[0].folder) is None:
            problem = f"adapter {digest[:16]} of fold {fold}, with which the targets were made, is missing"
            raise PartCorrupt(uri=store.uri, problem=problem)
        found.append(same[0])
    return StyleTeacher(adapters=tuple(found))


def train_missing(
    workspace: Workspace,
    corpus: CorpusManifest,
    digests: Sequence[str] | None,
    reporter: Reporter,
    cluster: OpenCluster,
) -> list[str]:
    """Train what is missing of the adapters that some targets were made with; the folders that were made whole.

    An adapter is trained as it was where its folder has lost its receipt, or more, and still has the list of its
    documents, all of which the corpus still has outside the fold. Where there is none that comes out right, the one
    that the corpus asks for now is trained.

    Args:
        workspace: of the output.
        corpus: its corpus.
        digests: of the adapters of all folds, in order; None: any will do that a run would use.
        reporter: where progress goes.
        cluster: what trains.

    Raises:
        PartCorrupt: an adapter that is to be kept is not what its receipt names.
        PartsFailed: an adapter could not be trained.
    """
    store, made = workspace.teacher, []
    plans = _fold_plans(workspace, corpus)
    for plan, digest in zip(plans, digests if digests is not None else [None] * len(plans), strict=False):

        def is_there(plan: FoldSpec = plan, digest: str | None = digest) -> bool:
            if digest is not None:
                return any(receipt.digest == digest for receipt in adapters_of_fold(store, plan.fold))
            return (find_adapter(store, plan.folder) or _find_kept(workspace, corpus, plan)) is not None

        for folder in [] if is_there() else _without_receipt(store, plan.fold, digest):
            before = _as_listed(workspace, corpus, plan, folder)
            if before is not None and not is_there():
                _train_folds(workspace, [before], reporter, cluster, as_listed=True)
                made.append(folder)
        if not is_there() and not store.exists(f"{plan.folder}/receipt.json"):
            _train_folds(workspace, [plan], reporter, cluster)
            made.append(plan.folder)
    return made


def _without_receipt(store: Store, fold: int, digest: str | None) -> list[str]:
    """Folders of a fold without a receipt, that first whose weights have this digest."""

    folders = [name for name in store.names(".") if parse_fold(name) == fold]
    bare = (name for name in folders if not store.exists(f"{name}/receipt.json"))
    return sorted(bare, key=lambda name: read_adapter_digest(store, name) != digest)


def _as_listed(workspace: Workspace, corpus: CorpusManifest, plan: FoldSpec, folder: str) -> FoldSpec | None:
    """The plan of the adapter in a folder, from the list in it; None where it cannot be trained as it was."""
    try:
        listed = _read_list(workspace.teacher, folder)
    except (FileNotFoundError, PartCorrupt):
        return None
    before = replace(plan, documents=listed.digests(plan.other_folds))
    same = before.folder == folder and _all_outside(workspace.corpus, corpus, listed, fold=plan.fold)
    return before if same else None


def _fold_plans(workspace: Workspace, corpus: CorpusManifest) -> list[FoldSpec]:
    settings, model = workspace.job.teacher, workspace.teacher_model
    if settings.folds == 0:
        return []
    dtype, device = training_precision(settings.training_dtype, device=settings.device)
    return [
        FoldSpec(
            fold=fold,
            documents=tuple(digest for home, digest in enumerate(corpus.train_digests) if home != fold),
            context_tokens=corpus.context_tokens,
            overlap_tokens=corpus.overlap_tokens,
            model=model.name,
            weights=model.weights,
            tokenizer_fingerprint=model.tokenizer.fingerprint,
            vocab_size=model.tokenizer.vocab_size,
            lora=settings.lora,
            optimizer=settings.optimizer,
            dtype=dtype,
            device=device,
            num_threads=settings.num_threads,
            seed=workspace.job.seed,
        )
        for fold in range(settings.folds)
    ]


def _train_folds(
    workspace: Workspace,
    plans: Sequence[FoldSpec],
    reporter: Reporter,
    cluster: OpenCluster,
    *,
    as_listed: bool = False,
) -> dict[int, AdapterReceipt]:
    tasks = [
        FoldTask(
            plan=plan,
            corpus=workspace.corpus.uri,
            teacher=workspace.teacher.uri,
            model=workspace.teacher_model.folder,
            device=workspace.job.teacher.device,
            as_listed=as_listed,
        )
        for plan in plans
    ]
    done: dict[int, AdapterReceipt] = {}
    shares: dict[int, tuple[float, float]] = {}
    running = cluster()
    with reporter.progress("teacher", total=100, unit="%") as progress:

        def hear(message: dict[str, Any]) -> None:
            shares[message["fold"]] = (message["step"] / message["steps"], message["loss"])
            share = sum(part for part, _ in shares.values()) / len(plans)
            loss = sum(loss for _, loss in shares.values()) / len(shares)
            progress(100 * share, note=f"{len(plans)} folds, loss {loss:.3f}")

        running.on_message(hear)
        failures = running.map_tasks(
            train_adapter,
            tasks,
            name=lambda task: f"teacher-{task.plan.folder}",
            on_result=lambda task, receipt, _: done.update({task.plan.fold: receipt}),
        )
        if not failures:
            progress(100, note=f"{len(plans)} folds")
    if failures:
        raise PartsFailed(failures=failures, out=workspace.teacher.uri)
    return done
