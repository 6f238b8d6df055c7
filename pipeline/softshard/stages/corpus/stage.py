"""The corpus stage: the job's sources in, the tokenised corpus and the retention text out.

It looks for what it would make and makes only what is missing. With `compute=False` it refuses instead, with the
command to run first.
"""

from __future__ import annotations

from dataclasses import dataclass

from softshard.cluster.cluster import OpenCluster
from softshard.config import CorpusSettings
from softshard.corpus.build import Encode, build_corpus, current_corpus
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing
from softshard.models import check_context
from softshard.output.workspace import Workspace
from softshard.stages.corpus.tokenize import encode_on, is_worth_a_cluster
from softshard.storage import Store
from softshard.telemetry import Reporter

__all__ = ["Corpora", "ensure_corpora", "retention_settings"]


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
