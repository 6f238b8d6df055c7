"""The corpus and the targets stage: documents to a corpus; a corpus and its style teacher to targets.

Each stage looks for what it would make and makes only what is missing. With `compute=False` it refuses instead, with
the command to run first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from softshard.config import CorpusSettings, SketchSettings
from softshard.corpus.build import Encode, build_corpus, current_corpus
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing
from softshard.models import check_context
from softshard.run.adapters import OpenCluster, StyleTeacher
from softshard.run.choice import ensure_resolved
from softshard.run.cluster import Cluster, open_cluster
from softshard.run.encoding import encode_on, is_worth_a_cluster
from softshard.run.parts import committed, find_missing, score_parts
from softshard.run.tasks import FoldTeacher, ScoreRun
from softshard.run.workspace import Workspace
from softshard.shard.card import write_card
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.shard.schema import SCHEMA_VERSION
from softshard.shard.spool import Spool
from softshard.storage import Store
from softshard.teacher.engines import identity_of, identity_of_run
from softshard.teacher.protocol import TeacherIdentity
from softshard.telemetry import Reporter

__all__ = [
    "Corpora",
    "ensure_corpora",
    "ensure_targets",
    "lazy_cluster",
    "plan_run",
    "retention_settings",
]


@contextmanager
def lazy_cluster(workspace: Workspace, reporter: Reporter) -> Iterator[OpenCluster]:
    """A function that starts the job's cluster when it is first called; it ends with the context."""
    with ExitStack() as stack:
        started: list[Cluster] = []

        def get() -> Cluster:
            if not started:
                started.append(stack.enter_context(open_cluster(workspace.job.cluster, reporter)))
            return started[0]

        yield get


def _encode_on(workspace: Workspace, cluster: OpenCluster, store: Store) -> Encode:
    model = workspace.teacher_model
    return encode_on(cluster, model=model.folder, fingerprint=model.tokenizer.fingerprint, out=store.uri)


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


def ensure_corpora(workspace: Workspace, reporter: Reporter, cluster: OpenCluster, *, compute: bool) -> Corpora:
    """The corpus and the retention text, tokenised with the teacher's tokenizer; a large one on the cluster."""
    job = workspace.job
    check_context(workspace.teacher_model.folder, context_tokens=job.corpus.context_tokens)

    def ensure(settings: CorpusSettings, store: Store, folds: int) -> CorpusManifest:
        tokenizer = workspace.teacher_model.tokenizer
        manifest = current_corpus(settings=settings, tokenizer=tokenizer, folds=folds, seed=job.seed, store=store)
        if manifest is not None:
            return manifest
        if not compute:
            raise ManifestMissing(uri=f"{store.uri}/manifest.json", stage="corpus")
        on_cluster = is_worth_a_cluster(settings, job.cluster)
        return build_corpus(
            settings=settings,
            tokenizer=tokenizer,
            folds=folds,
            seed=job.seed,
            store=store,
            reporter=reporter,
            encode=_encode_on(workspace, cluster, store) if on_cluster else None,
        )

    style = ensure(job.corpus, workspace.corpus, job.teacher.folds)
    settings = retention_settings(workspace)
    retention = None if settings is None else ensure(settings, workspace.retention, 0)
    return Corpora(style=style, retention=retention)


def plan_run(workspace: Workspace, corpus: CorpusManifest, teacher: StyleTeacher) -> ScoreRun:
    """What all parts of the run share, with the job's own target."""
    job, model = workspace.job, workspace.teacher_model
    teachers = {
        fold: FoldTeacher(identity=_identity(workspace, teacher, fold), adapters=teacher.of_fold(fold))
        for fold in {part.fold for part in corpus.slices}
    }
    return ScoreRun(
        corpus=workspace.corpus.uri,
        targets=workspace.targets.uri,
        teacher=workspace.teacher.uri,
        model=model.folder,
        device=job.teacher.device,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        teachers=teachers,
        sketch=job.target,
        seed=job.seed,
    )


def _identity(workspace: Workspace, teacher: StyleTeacher, fold: int) -> TeacherIdentity:
    adapters = [receipt.digest for receipt in teacher.of_fold(fold)]
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
        PartCorrupt: a committed part is not what its receipt names.
    """
    store = workspace.targets
    asked = plan_run(workspace, corpus, teacher)
    sketch = ensure_resolved(asked, corpus, reporter, cluster, job=workspace.job.name, compute=compute)
    run = replace(asked, sketch=sketch)
    missing = find_missing(store, run, corpus.slices)
    if missing.num_parts and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing.first_path}", stage="targets")
    if missing.num_parts:
        score_parts(cluster(), run, missing, reporter)
    manifest = _manifest(workspace, corpus, teacher, sketch, Spool(Receipt, committed(store, run, corpus.slices)))
    write_manifest(store, manifest)
    write_card(store, manifest)
    return manifest


def _manifest(
    workspace: Workspace,
    corpus: CorpusManifest,
    teacher: StyleTeacher,
    sketch: SketchSettings,
    receipts: Spool[Receipt],
) -> Manifest:
    job = workspace.job
    identity = identity_of_run(
        job.teacher,
        context_tokens=job.corpus.context_tokens,
        weights=workspace.teacher_model.weights,
        adapters=[receipt.digest for receipt in teacher.adapters],
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
        parts=receipts,
    )
