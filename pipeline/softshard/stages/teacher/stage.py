"""The teacher stage: the adapters of the style teacher, one per fold, kept from an earlier corpus or trained.

An adapter that was trained on this very corpus is preferred. Otherwise an adapter is kept that was trained in the same
way on documents that are all still outside its fold, if the text there has not grown by more than the job allows. So no
adapter knows text that the corpus no longer has, and none scores text that it was trained on. Each fold is decided
separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softshard.cluster.cluster import OpenCluster
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing, PartCorrupt, PartsFailed
from softshard.models import check_vocabulary, output_size
from softshard.output.workspace import Workspace
from softshard.stages.corpus.stage import StoredCorpus
from softshard.stages.teacher.earlier import EarlierAdapters
from softshard.stages.teacher.tasks import FoldTask, train_adapter
from softshard.storage import Store
from softshard.teacher.record import AdapterReceipt, adapters_of_fold, find_adapter, parse_fold, read_adapter_digest
from softshard.teacher.style import FoldSpec, training_precision
from softshard.telemetry import Reporter

__all__ = ["StyleTeacher", "ensure_teacher", "named_teacher", "train_missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleTeacher:
    """The adapters of all folds, in order; none where the model is used as it is."""

    adapters: tuple[AdapterReceipt, ...]

    def of_fold(self, fold: int) -> tuple[AdapterReceipt, ...]:
        """The adapters that score a fold: its own; all of them for the hold-out (-1)."""
        return self.adapters[fold : fold + 1] if fold >= 0 else self.adapters


def ensure_teacher(
    workspace: Workspace, corpus: CorpusManifest, reporter: Reporter, cluster: OpenCluster, *, compute: bool
) -> StyleTeacher:
    """The adapters of the style teacher, kept where they are usable and trained where they are missing.

    Raises:
        VocabularyMismatch: the teacher's model lacks logits for its tokenizer.
        ManifestMissing: an adapter is missing and `compute` is false.
        PartCorrupt: an adapter, or a list of documents, is not what its record names.
        PartsFailed: an adapter could not be trained.
    """
    store, model = workspace.teacher, workspace.teacher_model
    check_vocabulary(
        model=model.name, model_size=output_size(model.folder), data="its tokenizer", data_size=corpus.vocab_size
    )
    specs = _fold_specs(workspace, corpus)
    earlier = _earlier_adapters(workspace, corpus)
    found = {spec.fold: find_adapter(store, spec.folder) for spec in specs}
    kept = {spec.fold: earlier.find(spec) for spec in specs if found[spec.fold] is None}
    found.update(kept)
    missing = [spec for spec in specs if found[spec.fold] is None]
    if missing and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing[0].folder}/receipt.json", stage="teacher")
    _report_kept(earlier, [receipt for receipt in kept.values() if receipt is not None], reporter, num_folds=len(specs))
    if missing:
        found.update(_train_folds(workspace, missing, reporter, cluster))
    ready = (found[spec.fold] for spec in specs)
    return StyleTeacher(adapters=tuple(receipt for receipt in ready if receipt is not None))


def _earlier_adapters(workspace: Workspace, corpus: CorpusManifest) -> EarlierAdapters:
    return EarlierAdapters(
        store=workspace.teacher,
        corpus=StoredCorpus(store=workspace.corpus, manifest=corpus),
        max_growth=workspace.job.teacher.retrain_growth,
    )


def _report_kept(
    earlier: EarlierAdapters, kept: Sequence[AdapterReceipt], reporter: Reporter, *, num_folds: int
) -> None:
    if kept:
        growth = max(earlier.growth(receipt) for receipt in kept)
        num = len(kept)
        reporter.say(
            f"teacher: {'adapters' if num == num_folds else f'{num} of {num_folds} adapters'} of an earlier corpus"
            f" kept, the text outside their folds has grown by {100 * growth:.1f}%"
            f" (retrain_growth is {100 * earlier.max_growth:g}%)"
        )


def named_teacher(store: Store, digests: Sequence[str]) -> StyleTeacher:
    """The adapters that a manifest of targets names, which may differ from those that a run would choose now.

    Args:
        store: the `teacher/` folder.
        digests: of the adapters of all folds, in order; empty where the model was used as it is.

    Raises:
        PartCorrupt: an adapter is missing, or one of its files is not as it was written.
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
    """Train the missing ones of the adapters that some targets were made with; returns their folders.

    An adapter whose folder has lost its receipt, or more, is trained as before where the list of its documents is still
    there and the corpus still has all of them outside the fold. Where no folder gives the wanted adapter, the one for
    the present corpus is trained.

    Args:
        workspace: of the output.
        corpus: its corpus.
        digests: of the adapters of all folds, in order; None: any adapter that a run would use.
        reporter: where progress goes.
        cluster: opens the cluster that trains.

    Raises:
        PartCorrupt: an adapter that should be kept is not what its receipt names.
        PartsFailed: an adapter could not be trained.
    """
    store, made = workspace.teacher, []
    specs, earlier = _fold_specs(workspace, corpus), _earlier_adapters(workspace, corpus)
    for spec, digest in zip(specs, digests if digests is not None else [None] * len(specs), strict=False):

        def is_there(spec: FoldSpec = spec, digest: str | None = digest) -> bool:
            if digest is not None:
                return any(receipt.digest == digest for receipt in adapters_of_fold(store, spec.fold))
            return (find_adapter(store, spec.folder) or earlier.find(spec)) is not None

        for folder in [] if is_there() else _folders_without_receipt(store, spec.fold, digest):
            before = earlier.spec_as_listed(spec, folder)
            if before is not None and not is_there():
                _train_folds(workspace, [before], reporter, cluster, as_listed=True)
                made.append(folder)
        if not is_there() and not store.exists(f"{spec.folder}/receipt.json"):
            _train_folds(workspace, [spec], reporter, cluster)
            made.append(spec.folder)
    return made


def _folders_without_receipt(store: Store, fold: int, digest: str | None) -> list[str]:
    """Folders of a fold without a receipt; first the one whose weights have the digest."""
    folders = [name for name in store.names(".") if parse_fold(name) == fold]
    bare = (name for name in folders if not store.exists(f"{name}/receipt.json"))
    return sorted(bare, key=lambda name: read_adapter_digest(store, name) != digest)


def _fold_specs(workspace: Workspace, corpus: CorpusManifest) -> list[FoldSpec]:
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
    specs: Sequence[FoldSpec],
    reporter: Reporter,
    cluster: OpenCluster,
    *,
    as_listed: bool = False,
) -> dict[int, AdapterReceipt]:
    tasks = [
        FoldTask(
            spec=spec,
            corpus=workspace.corpus.uri,
            teacher=workspace.teacher.uri,
            model=workspace.teacher_model.folder,
            device=workspace.job.teacher.device,
            as_listed=as_listed,
        )
        for spec in specs
    ]
    done: dict[int, AdapterReceipt] = {}
    shares: dict[int, tuple[float, float]] = {}
    running = cluster()
    with reporter.progress("teacher", total=100, unit="%") as progress:

        def on_message(message: dict[str, Any]) -> None:
            shares[message["fold"]] = (message["step"] / message["steps"], message["loss"])
            share = sum(part for part, _ in shares.values()) / len(specs)
            loss = sum(loss for _, loss in shares.values()) / len(shares)
            progress(100 * share, note=f"{len(specs)} folds, loss {loss:.3f}")

        running.on_message(on_message)
        failures = running.map_tasks(
            train_adapter,
            tasks,
            name=lambda task: f"teacher-{task.spec.folder}",
            on_result=lambda task, receipt, _: done.update({task.spec.fold: receipt}),
        )
        if not failures:
            progress(100, note=f"{len(specs)} folds")
    if failures:
        raise PartsFailed(failures=failures, out=workspace.teacher.uri)
    return done
