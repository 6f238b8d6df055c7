"""The targets stage: scores the corpus with its style teacher and writes the parts and their manifest.

Only missing parts are computed. With `compute=False` nothing is made: a missing part is an error that names the command
to run first.
"""

from __future__ import annotations

from dataclasses import replace

from softshard.cluster.cluster import OpenCluster
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import ManifestMissing
from softshard.output.workspace import Workspace
from softshard.records.spool import Spool
from softshard.shard.card import write_card
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.stages.targets.parts import committed, find_missing, score_parts
from softshard.stages.targets.tasks import FoldTeacher, ScoringSpec
from softshard.stages.targets.threshold import ensure_tau
from softshard.stages.teacher.stage import StyleTeacher
from softshard.teacher.engines import run_teacher_identity, teacher_identity
from softshard.teacher.protocol import TeacherIdentity
from softshard.telemetry import Reporter

__all__ = ["ensure_targets", "make_scoring_spec"]


def make_scoring_spec(workspace: Workspace, corpus: CorpusManifest, teacher: StyleTeacher) -> ScoringSpec:
    """What all parts of a run share, with the job's own sketch settings."""
    job, model = workspace.job, workspace.teacher_model

    def identity(fold: int) -> TeacherIdentity:
        return teacher_identity(
            job.teacher,
            context_tokens=job.corpus.context_tokens,
            weights=model.weights,
            adapters=[receipt.digest for receipt in teacher.of_fold(fold)],
        )

    teachers = {
        fold: FoldTeacher(identity=identity(fold), adapters=teacher.of_fold(fold))
        for fold in {part.fold for part in corpus.slices}
    }
    return ScoringSpec(
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
        schema_version=corpus.part_version,
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
    """The targets of the whole corpus: computes missing parts, then writes the manifest and the card.

    Raises:
        JobInvalid: the target has a budget that no tau keeps.
        PartsFailed: some parts were set aside; no manifest was written.
        PartCorrupt: a committed part is not what its receipt names.
        ManifestMissing: a part is missing and `compute` is false.
    """
    store = workspace.targets
    spec = make_scoring_spec(workspace, corpus, teacher)
    sketch = ensure_tau(spec, corpus, reporter, cluster, job=workspace.job.name, compute=compute)
    spec = replace(spec, sketch=sketch)
    missing = find_missing(store, spec, corpus.slices)
    if missing.num_parts and not compute:
        raise ManifestMissing(uri=f"{store.uri}/{missing.first_path}", stage="targets")
    if missing.num_parts:
        score_parts(cluster(), spec, missing, reporter)
    identity = run_teacher_identity(
        workspace.job.teacher,
        context_tokens=workspace.job.corpus.context_tokens,
        weights=workspace.teacher_model.weights,
        adapters=[receipt.digest for receipt in teacher.adapters],
    )
    receipts = Spool(Receipt, committed(store, spec, corpus.slices))
    manifest = _make_manifest(spec, corpus, receipts, job=workspace.job.name, teacher=identity)
    write_manifest(store, manifest)
    write_card(store, manifest)
    return manifest


def _make_manifest(
    spec: ScoringSpec, corpus: CorpusManifest, receipts: Spool[Receipt], *, job: str, teacher: TeacherIdentity
) -> Manifest:
    return Manifest(
        schema_version=spec.schema_version,
        job=job,
        corpus=corpus.digest,
        sources=corpus.sources,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        context_tokens=corpus.context_tokens,
        overlap_tokens=corpus.overlap_tokens,
        target=spec.sketch.model_dump(mode="json"),
        seed=spec.seed,
        teacher=dict(teacher),
        fidelity=mean_fidelity(receipts),
        bytes_per_position=bytes_per_position(receipts),
        parts=receipts,
    )
