"""The first three stages: documents to a corpus, a corpus to a style teacher, both to targets.

Each stage looks for what it would make and makes only what is missing. With `compute=False` it refuses instead, with
the command to run first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softshard.config import CorpusSettings, SketchSettings
from softshard.corpus.build import build_corpus, current_corpus
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing, PartsFailed
from softshard.models import check_context, check_vocabulary, output_size
from softshard.run.choice import ensure_resolved
from softshard.run.cluster import Cluster, open_cluster
from softshard.run.tasks import FoldTask, ScoreTask, score_part, train_adapter
from softshard.run.workspace import Workspace
from softshard.shard.card import write_card
from softshard.shard.commit import PartPlan, find_receipt
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.shard.schema import SCHEMA_VERSION
from softshard.storage import LocalStore
from softshard.teacher.engines import identity_of, identity_of_run
from softshard.teacher.protocol import TeacherIdentity
from softshard.teacher.style import AdapterReceipt, FoldPlan, find_adapter, training_precision
from softshard.telemetry import Reporter

__all__ = [
    "Corpora",
    "StyleTeacher",
    "ensure_corpora",
    "ensure_targets",
    "ensure_teacher",
    "lazy_cluster",
    "plan_parts",
    "retention_settings",
]

OpenCluster = Callable[[], Cluster]


@contextmanager
def lazy_cluster(workspace: Workspace, reporter: Reporter) -> Iterator[OpenCluster]:
    """A function that starts the job's cluster when it is first called; it ends with the context."""
    with ExitStack() as stack:
        started: list[Cluster] = []

        def get() -> Cluster:
            if not started:
                settings = workspace.job.cluster
                where = settings.scheduler or f"{settings.workers} local worker(s)"
                reporter.say(f"cluster: {where}")
                started.append(stack.enter_context(open_cluster(settings)))
            return started[0]

        yield get


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpora:
    """The corpus of the style, and the text that retention is measured and trained on."""

    style: CorpusManifest
    retention: CorpusManifest | None


def retention_settings(workspace: Workspace) -> CorpusSettings | None:
    """How the retention text is read: as the corpus is, from sources of its own."""
    retention = workspace.job.train.retention
    if retention is None:
        return None
    return workspace.job.corpus.model_copy(update={"sources": retention.sources})


def ensure_corpora(workspace: Workspace, reporter: Reporter, *, compute: bool) -> Corpora:
    """The corpus and the retention text, tokenised with the teacher's tokenizer."""
    job = workspace.job
    check_context(workspace.teacher_model.folder, context_tokens=job.corpus.context_tokens)

    def ensure(settings: CorpusSettings, store: LocalStore, folds: int) -> CorpusManifest:
        tokenizer = workspace.teacher_model.tokenizer
        manifest = current_corpus(settings=settings, tokenizer=tokenizer, folds=folds, seed=job.seed, store=store)
        if manifest is not None:
            return manifest
        if not compute:
            raise ManifestMissing(uri=f"{store.uri}/manifest.json", stage="corpus")
        return build_corpus(
            settings=settings, tokenizer=tokenizer, folds=folds, seed=job.seed, store=store, reporter=reporter
        )

    style = ensure(job.corpus, workspace.corpus, job.teacher.folds)
    settings = retention_settings(workspace)
    retention = None if settings is None else ensure(settings, workspace.retention, 0)
    return Corpora(style=style, retention=retention)


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleTeacher:
    """The adapters of all folds, in order; none where the model is used as it is."""

    adapters: tuple[tuple[Path, AdapterReceipt], ...]

    def of_fold(self, fold: int) -> tuple[tuple[Path, AdapterReceipt], ...]:
        """Adapters that score a fold: its own, or all of them for the hold-out."""
        return self.adapters[fold : fold + 1] if fold >= 0 else self.adapters


def ensure_teacher(
    workspace: Workspace, corpus: CorpusManifest, reporter: Reporter, cluster: OpenCluster, *, compute: bool
) -> StyleTeacher:
    """The style teacher's adapters, trained where they are missing."""
    store, model = workspace.teacher, workspace.teacher_model
    check_vocabulary(
        model=model.name, model_size=output_size(model.folder), data="its tokenizer", data_size=corpus.vocab_size
    )
    plans = _fold_plans(workspace, corpus)
    found = {plan.fold: find_adapter(store, plan) for plan in plans}
    missing = [plan for plan in plans if found[plan.fold] is None]
    if missing and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing[0].folder}/receipt.json", stage="teacher")
    if missing:
        found.update(_train_folds(workspace, corpus, missing, reporter, cluster))
    ready = [(plan, receipt) for plan in plans if (receipt := found[plan.fold]) is not None]
    return StyleTeacher(adapters=tuple((store.local_path(plan.folder), receipt) for plan, receipt in ready))


def _fold_plans(workspace: Workspace, corpus: CorpusManifest) -> list[FoldPlan]:
    settings, model = workspace.job.teacher, workspace.teacher_model
    if settings.folds == 0:
        return []
    dtype, device = training_precision(settings.training_dtype, device=settings.device)
    train = [part for part in corpus.slices if part.split == "train"]
    return [
        FoldPlan(
            fold=fold,
            slices=tuple(part.sha256 for part in train if part.fold != fold),
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
    workspace: Workspace, corpus: CorpusManifest, plans: Sequence[FoldPlan], reporter: Reporter, cluster: OpenCluster
) -> dict[int, AdapterReceipt]:
    tasks = [
        FoldTask(
            plan=plan,
            corpus=workspace.corpus.uri,
            manifest=corpus,
            teacher=workspace.teacher.uri,
            model=workspace.teacher_model.folder,
            device=workspace.job.teacher.device,
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
            on_result=lambda task, receipt: done.update({task.plan.fold: receipt}),
        )
        if not failures:
            progress(100, note=f"{len(plans)} folds")
    if failures:
        raise PartsFailed(failures=failures, out=workspace.teacher.uri)
    return done


def plan_parts(workspace: Workspace, corpus: CorpusManifest, teacher: StyleTeacher) -> list[ScoreTask]:
    """Every part of the run, with the job's own target, fold after fold so that a worker keeps its engine.

    `plan.index` is the corpus's order.
    """
    job, model = workspace.job, workspace.teacher_model
    identities = {fold: _identity(workspace, teacher, fold) for fold in {part.fold for part in corpus.slices}}
    tasks = []
    for index, part in enumerate(corpus.slices):
        adapters = teacher.of_fold(part.fold)
        plan = PartPlan(
            index=index,
            split=part.split,
            fold=part.fold,
            slice=part.sha256,
            tokenizer_fingerprint=corpus.tokenizer_fingerprint,
            vocab_size=corpus.vocab_size,
            teacher=identities[part.fold],
            sketch=job.target,
            seed=job.seed,
        )
        task = ScoreTask(
            plan=plan,
            slice=part,
            corpus=workspace.corpus.uri,
            targets=workspace.targets.uri,
            model=model.folder,
            adapters=tuple(folder for folder, _ in adapters),
            device=job.teacher.device,
        )
        tasks.append(task)
    return sorted(tasks, key=lambda task: (task.plan.fold, task.plan.index))


def _identity(workspace: Workspace, teacher: StyleTeacher, fold: int) -> TeacherIdentity:
    adapters = [receipt.digest for _, receipt in teacher.of_fold(fold)]
    return identity_of(
        workspace.job.teacher,
        context_tokens=workspace.job.corpus.context_tokens,
        weights=workspace.teacher_model.weights,
        adapters=adapters,
    )


def ensure_targets(
    workspace: Workspace,
    corpus: CorpusManifest,
    teacher: StyleTeacher,
    reporter: Reporter,
    cluster: OpenCluster,
    *,
    compute: bool,
) -> Manifest:
    """The targets of the whole corpus: parts computed where they are missing, then the manifest and the card.

    Raises:
        JobInvalid: the target has a budget that no tau keeps.
        PartsFailed: some parts were set aside; no manifest was written.
    """
    store = workspace.targets
    asked = plan_parts(workspace, corpus, teacher)
    tasks = ensure_resolved(asked, corpus, reporter, cluster, job=workspace.job.name, compute=compute)
    receipts: dict[str, Receipt] = {}
    missing = []
    for task in tasks:
        receipt = find_receipt(store, task.plan.part_id)
        if receipt is None:
            missing.append(task)
        else:
            receipts[task.plan.part_id] = receipt
    if missing and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing[0].plan.path}", stage="targets")
    if missing:
        receipts.update(_score_parts(workspace, missing, reporter, cluster))
    in_order = sorted(tasks, key=lambda task: task.plan.index)
    ordered = [receipts[task.plan.part_id] for task in in_order]
    manifest = _manifest(workspace, corpus, teacher, tasks[0].plan.sketch, ordered)
    write_manifest(store, manifest)
    write_card(store, manifest)
    return manifest


def _score_parts(
    workspace: Workspace, tasks: Sequence[ScoreTask], reporter: Reporter, cluster: OpenCluster
) -> dict[str, Receipt]:
    receipts: dict[str, Receipt] = {}
    total = sum(task.slice.num_labels for task in tasks)
    running = cluster()
    with reporter.progress("targets", total=total, unit="positions") as progress:
        done = 0

        def committed(task: ScoreTask, receipt: Receipt) -> None:
            nonlocal done
            receipts[task.plan.part_id] = receipt
            done += receipt.num_labels
            progress(done, note=f"{len(receipts)}/{len(tasks)} parts")

        failures = running.run(score_part, tasks, name=lambda task: f"part-{task.plan.part_id}", on_result=committed)
    if failures:
        raise PartsFailed(failures=failures, out=workspace.targets.uri)
    return receipts


def _manifest(
    workspace: Workspace,
    corpus: CorpusManifest,
    teacher: StyleTeacher,
    sketch: SketchSettings,
    receipts: Sequence[Receipt],
) -> Manifest:
    job = workspace.job
    identity = identity_of_run(
        job.teacher,
        context_tokens=job.corpus.context_tokens,
        weights=workspace.teacher_model.weights,
        adapters=[receipt.digest for _, receipt in teacher.adapters],
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        job=job.name,
        corpus=corpus.digest,
        sources=corpus.sources,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        context_tokens=corpus.context_tokens,
        overlap_tokens=corpus.overlap_tokens,
        target=sketch.model_dump(mode="json"),
        seed=job.seed,
        teacher=dict(identity),
        fidelity=mean_fidelity(receipts),
        bytes_per_position=bytes_per_position(receipts),
        parts=tuple(receipts),
    )
