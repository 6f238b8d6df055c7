"""The teacher stage: a corpus in, the adapters of its folds out, kept from an earlier corpus or trained.

An adapter that was trained on this very corpus is preferred. Else one is kept that was trained in the same way on
documents that are all still outside its fold, if the text there has not grown by more than the job allows; so no
adapter knows text that the corpus no longer has, and none scores what it was trained on. Each fold is judged alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softshard.corpus.documents import train_documents_outside
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing, PartCorrupt, PartsFailed
from softshard.models import check_vocabulary, output_size
from softshard.run.cluster import Cluster
from softshard.run.tasks import FoldTask, train_adapter
from softshard.run.workspace import Workspace
from softshard.storage import Store
from softshard.teacher.documents import DOCUMENTS_FILE, TrainedDocuments, decode_documents
from softshard.teacher.record import AdapterReceipt, adapters_of_fold, find_adapter, fold_of_folder
from softshard.teacher.style import FoldPlan, training_precision
from softshard.telemetry import Reporter
from softshard.train.record import check_files

__all__ = ["OpenCluster", "StyleTeacher", "ensure_teacher", "train_again"]

OpenCluster = Callable[[], Cluster]


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


def _find_kept(workspace: Workspace, corpus: CorpusManifest, plan: FoldPlan) -> AdapterReceipt | None:
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


def train_again(
    workspace: Workspace, corpus: CorpusManifest, folders: Collection[str], reporter: Reporter, cluster: OpenCluster
) -> None:
    """Train adapters whose folder has lost its receipt, or a file, on the documents that the list in it names.

    Those that cannot be trained as they were are left: of other settings, without a sound list, or of documents that
    the corpus no longer has outside their fold.

    Raises:
        PartsFailed: an adapter could not be trained.
    """
    for plan in _fold_plans(workspace, corpus):
        for folder in sorted(folder for folder in folders if fold_of_folder(folder) == plan.fold):
            try:
                listed = _read_list(workspace.teacher, folder)
            except (FileNotFoundError, PartCorrupt):
                continue
            before = replace(plan, documents=listed.digests(plan.other_folds))
            if before.folder == folder and _all_outside(workspace.corpus, corpus, listed, fold=plan.fold):
                _train_folds(workspace, [before], reporter, cluster, as_listed=True)


def _fold_plans(workspace: Workspace, corpus: CorpusManifest) -> list[FoldPlan]:
    settings, model = workspace.job.teacher, workspace.teacher_model
    if settings.folds == 0:
        return []
    dtype, device = training_precision(settings.training_dtype, device=settings.device)
    return [
        FoldPlan(
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
    plans: Sequence[FoldPlan],
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
        failures = running.run(
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
