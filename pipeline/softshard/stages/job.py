"""A whole job: its stages in order, each making only what is missing, with one cluster for those that need one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from softshard.cluster.cluster import lazy_cluster
from softshard.config import Job
from softshard.corpus.manifest import CorpusManifest
from softshard.errors import JobInvalid
from softshard.evaluate.report import Report
from softshard.finetune.record import Trained
from softshard.output.lease import Lease, hold_lease
from softshard.output.workspace import Workspace, claim, open_workspace
from softshard.shard.manifest import Manifest
from softshard.stages import STAGES
from softshard.stages.corpus.stage import ensure_corpora
from softshard.stages.estimate import weigh_corpus
from softshard.stages.evaluate import ensure_report
from softshard.stages.models import check_models
from softshard.stages.targets.stage import ensure_targets
from softshard.stages.teacher.stage import ensure_teacher
from softshard.stages.train.author_cap import check_corpora
from softshard.stages.train.stage import ensure_trained
from softshard.telemetry import Reporter

__all__ = ["Outcome", "refuse_without_holdout", "run_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job has made; None for what no requested stage needs."""

    out: str
    seconds: float
    manifest: Manifest | None = None
    trained: Trained | None = None
    report: Report | None = None


def run_job(job: Job, reporter: Reporter, *, stages: Collection[str] = STAGES, run: str | None = None) -> Outcome:
    """Run some stages of a job. An earlier stage that is not among them must be complete.

    Raises:
        ManifestMissing: an earlier stage that was not requested is not complete, or its settings have changed.
        JobInvalid: a requested stage needs a hold-out, and the job has none.
        OutputBusy: another run works on the output.
        LeaseLost: this run was taken for dead, and another run has taken over.
        SoftshardError: see the stages.
    """
    refuse_without_holdout(job, stages)
    workspace = open_workspace(job)
    for warning in check_models(workspace, stages):
        reporter.say(f"warning: {warning}")
    with hold_lease(workspace.out, job=job.name, run=run or uuid.uuid4().hex[:12]) as lease:
        # Checked again: another job may have claimed the empty folder before this run had the lease.
        open_workspace(job)
        claim(workspace)
        return _run_stages(workspace, reporter, stages, lease)


def _run_stages(workspace: Workspace, reporter: Reporter, stages: Collection[str], lease: Lease) -> Outcome:
    started = time.monotonic()
    last = max(STAGES.index(stage) for stage in stages)
    manifest: Manifest | None = None
    trained: Trained | None = None
    report: Report | None = None

    @contextmanager
    def stage(name: str) -> Iterator[bool]:
        """Yields whether the stage was requested; if so, reports its start and end."""
        lease.check()
        with _reported(name, reporter) if name in stages else nullcontext():
            yield name in stages

    with lazy_cluster(workspace.job.cluster, reporter) as cluster:
        with stage("corpus") as compute:
            corpora = ensure_corpora(workspace, reporter, cluster, compute=compute)
            if compute:
                _warn_of_little(workspace.job, corpora.style.manifest, reporter)
        if last >= STAGES.index("teacher"):
            check_corpora(workspace, corpora)
            with stage("teacher") as compute:
                teacher = ensure_teacher(workspace, corpora.style.manifest, reporter, cluster, compute=compute)
        if last >= STAGES.index("targets"):
            with stage("targets") as compute:
                manifest = ensure_targets(
                    workspace, corpora.style.manifest, teacher, reporter, cluster, compute=compute
                )
    if manifest is not None and last >= STAGES.index("train"):
        with stage("train") as compute:
            trained = ensure_trained(workspace, manifest, corpora.retention, reporter, compute=compute)
        if last >= STAGES.index("evaluate"):
            with stage("evaluate") as compute:
                report = ensure_report(workspace, corpora, manifest, trained, reporter, compute=compute)
    seconds = time.monotonic() - started
    return Outcome(out=workspace.job.out, seconds=seconds, manifest=manifest, trained=trained, report=report)


def _warn_of_little(job: Job, corpus: CorpusManifest, reporter: Reporter) -> None:
    """Say where a corpus is too small for its trainings or its hold-out to mean much."""
    train_tokens = sum(part.num_tokens for part in corpus.slices if part.split == "train")
    test_documents = sum(part.num_documents for part in corpus.slices if part.split == "test")
    for warning in weigh_corpus(job, train_tokens=train_tokens, test_documents=test_documents):
        reporter.say(f"warning: {warning}")


@contextmanager
def _reported(stage: str, reporter: Reporter) -> Iterator[None]:
    """Report that a stage starts and, unless it raises, that it has finished."""
    started = time.monotonic()
    reporter.event("stage_started", stage=stage)
    yield
    reporter.event("stage_finished", stage=stage, seconds=round(time.monotonic() - started, 3))


def refuse_without_holdout(job: Job, stages: Collection[str]) -> None:
    """Refuse stages that measure on the hold-out where the job has none. Raises JobInvalid."""
    chooses = job.train.baseline is not None or job.train.sweep is not None
    needs = "evaluate" in stages or ("train" in stages and chooses)
    if needs and job.corpus.holdout_fraction == 0:
        problem = (
            "is 0, but the report and the choice among trainings are measured on the hold-out;"
            " set it above 0, or run the stages corpus, teacher and targets alone"
        )
        raise JobInvalid(file=f"job {job.name}", place="corpus.holdout_fraction", problem=problem)
