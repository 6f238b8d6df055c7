"""The corpus stage: reads the job's sources and stores the tokenised corpus and the retention text.

A complete corpus of the same settings is reused. With `compute=False` nothing is made: a missing corpus is an error
that names the command to run first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from softshard.cluster.cluster import OpenCluster
from softshard.config import CorpusSettings, Job
from softshard.corpus.build import build_corpus, current_corpus
from softshard.corpus.counts import GroupCount
from softshard.corpus.documents import train_groups
from softshard.corpus.manifest import CorpusManifest
from softshard.corpus.read import iter_sequences
from softshard.corpus.reading import Encode
from softshard.errors import CorpusEmpty, ManifestMissing
from softshard.models import check_context
from softshard.output.workspace import Workspace
from softshard.sketch.types import TokenSequence
from softshard.stages.corpus.tokenize import encode_on, is_worth_a_cluster
from softshard.storage import Store
from softshard.telemetry import Reporter

__all__ = ["Corpora", "StoredCorpus", "ensure_corpora", "naming_retention", "retention_settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCorpus:
    """A tokenised corpus and the folder that holds it."""

    store: Store
    manifest: CorpusManifest

    def sequences(self, split: str) -> Iterator[TokenSequence]:
        """Sequences of a split, in the order of the slices."""
        return iter_sequences(self.store, self.manifest, split=split)

    def train_groups(self) -> tuple[GroupCount, ...]:
        """Counts of the train split by source, style and group."""
        return train_groups(self.store, self.manifest.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpora:
    """The corpus of the style, and the text on which retention is trained and measured."""

    style: StoredCorpus
    retention: StoredCorpus | None


def retention_settings(job: Job) -> CorpusSettings | None:
    """The corpus settings of the retention text: those of the corpus, with its own sources; None without such text."""
    retention = job.train.retention
    return None if retention is None else job.corpus.model_copy(update={"sources": retention.sources})


@contextmanager
def naming_retention() -> Iterator[None]:
    """Within the context, an empty corpus is that of the retention text, and its error names that section."""
    try:
        yield
    except CorpusEmpty as error:
        section = "train.retention"
        raise CorpusEmpty(counts=error.counts, split=error.split, enough=error.enough, section=section) from error


def ensure_corpora(workspace: Workspace, reporter: Reporter, cluster: OpenCluster, *, compute: bool) -> Corpora:
    """The corpus and the retention text, tokenised with the teacher's tokenizer, on the cluster where they are large.

    Raises:
        ManifestMissing: one is missing and `compute` is false.
    """
    job, model = workspace.job, workspace.teacher_model
    check_context(model.folder, context_tokens=job.corpus.context_tokens)

    def ensure(settings: CorpusSettings, store: Store, folds: int) -> StoredCorpus:
        tokenizer = model.tokenizer
        manifest = current_corpus(settings=settings, tokenizer=tokenizer, folds=folds, seed=job.seed, store=store)
        if manifest is None and not compute:
            raise ManifestMissing(uri=f"{store.uri}/manifest.json", stage="corpus")
        if manifest is None:
            encode: Encode | None = None
            if is_worth_a_cluster(settings, job.cluster):
                encode = encode_on(cluster, model=model.folder, fingerprint=tokenizer.fingerprint, out=store.uri)
            manifest = build_corpus(
                settings=settings,
                tokenizer=tokenizer,
                folds=folds,
                seed=job.seed,
                store=store,
                reporter=reporter,
                encode=encode,
            )
        return StoredCorpus(store=store, manifest=manifest)

    style = ensure(job.corpus, workspace.corpus, job.teacher.folds)
    settings = retention_settings(job)
    with naming_retention():
        retention = None if settings is None else ensure(settings, workspace.retention, 0)
    return Corpora(style=style, retention=retention)
