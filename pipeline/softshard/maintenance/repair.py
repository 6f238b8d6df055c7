"""Repairing an output: what `verify` finds bad is set aside, and exactly that, and what is missing, is made again.

Needs the model and, for the corpus, the sources. A damaged receipt whose part is sound is written again from the
manifest; a part is computed by the task that made it; an adapter of the style teacher that the targets were made with
is trained on the documents that its list names; a slice is cut from the sources. Nothing else is touched. The manifest
stays the same where parts are computed to the same bytes, which the transformers engine does on the same hardware;
where they are not, a new manifest names the new parts.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass

from softshard.cluster.cluster import OpenCluster, lazy_cluster
from softshard.corpus.build import build_corpus
from softshard.corpus.manifest import CorpusManifest, write_corpus_manifest
from softshard.corpus.verify import CorpusVerification
from softshard.errors import NotRepairable, PartCorrupt
from softshard.maintenance.repair_targets import read_complete_corpus, repair_targets
from softshard.maintenance.verify import Checked, check_output
from softshard.output.lease import hold_lease
from softshard.output.workspace import Workspace, saved_job
from softshard.records.canonical import canonical_json
from softshard.shard.manifest import read_manifest
from softshard.shard.quarantine import Quarantine
from softshard.stages.corpus.stage import retention_settings
from softshard.stages.teacher.stage import named_teacher, train_missing
from softshard.storage import LocalStore, Store, open_store
from softshard.telemetry import Reporter

__all__ = ["Repaired", "repair"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair has done; paths are relative to the output folder."""

    num_problems: int
    """Findings before the repair."""
    set_aside: tuple[str, ...]
    """New paths of the bad files."""
    made: tuple[str, ...]
    """Files that were made again."""
    left: tuple[str, ...]
    """Adapters of the student, which the next run trains again."""
    manifest: str | None
    """Digest of the targets' manifest."""
    manifest_before: str | None
    """The digest before the repair; null where no manifest could be read."""


def repair(out: str, reporter: Reporter, *, deep: bool) -> Repaired:
    """Verify an output and repair the findings.

    Args:
        out: the output folder.
        reporter: where progress goes.
        deep: decode every sketch while verifying.

    Raises:
        JobInvalid: there is no job in the folder.
        OutputBusy: a run works on the output.
        NotRepairable: what is bad cannot be made again from what there is now; it and all after it is left as it was.
        PartsFailed: a part, or an adapter, could not be computed.
        SoftshardError: see the stages.
    """
    store = open_store(out)
    job = saved_job(store)
    with hold_lease(store, job=job.name, run=f"repair-{uuid.uuid4().hex[:8]}") as lease:
        with reporter.progress("verify", total=None, unit="parts") as progress:
            checked = check_output(store, deep=deep, on_part=lambda done, total: progress(done, total=total))
        workspace, quarantine = Workspace(job=job, out=store), Quarantine(store, before_each=lease.check)
        made = _repair_corpora(workspace, checked, quarantine, reporter)
        left = _set_adapters_aside(checked, quarantine)
        with lazy_cluster(workspace.job.cluster, reporter) as cluster:
            if checked.findings["teacher"]:
                made += _train_teacher(workspace, checked, reporter, cluster)
            made += repair_targets(workspace, checked.targets, quarantine, reporter, cluster)
        before = checked.targets.manifest
        now = read_manifest(workspace.targets) if store.exists("targets/manifest.json") else None
        return Repaired(
            num_problems=sum(len(findings) for findings in checked.findings.values()),
            set_aside=tuple(quarantine.taken),
            made=tuple(made),
            left=tuple(left),
            manifest=now.digest if now else None,
            manifest_before=before.digest if before else None,
        )


def _repair_corpora(workspace: Workspace, checked: Checked, quarantine: Quarantine, reporter: Reporter) -> list[str]:
    """Build each bad corpus again beside itself and copy what it lacks; returns the paths that were made again."""
    made = []
    for name, found in checked.corpora.items():
        if not found.findings:
            continue
        expected = found.manifest.digest if found.manifest else None
        if expected is None and name == "corpus" and checked.targets.manifest:
            expected = checked.targets.manifest.corpus
        with tempfile.TemporaryDirectory(prefix="softshard-corpus-") as folder:
            scratch = LocalStore(folder)
            rebuilt = _rebuild(workspace, name, scratch, reporter)
            if expected not in {None, rebuilt.digest}:
                problem = (
                    f"is corpus {str(expected)[:16]}, but the sources, or the settings in job.yaml, have changed since"
                    f" and give {rebuilt.digest[:16]}; `softshard run JOB.yaml` makes all of what is there now"
                )
                raise NotRepairable(uri=workspace.out.below(name).uri, problem=problem)
            made += [
                f"{name}/{path}"
                for path in _replace_bad_files(workspace.out, name, found, rebuilt, scratch, quarantine)
            ]
    return made


def _rebuild(workspace: Workspace, name: str, scratch: Store, reporter: Reporter) -> CorpusManifest:
    job = workspace.job
    settings = job.corpus if name == "corpus" else retention_settings(job)
    if settings is None:
        problem = "is damaged, and the job has no retention text any more; remove this folder"
        raise NotRepairable(uri=workspace.out.below(name).uri, problem=problem)
    return build_corpus(
        settings=settings,
        tokenizer=workspace.teacher_model.tokenizer,
        folds=job.teacher.folds if name == "corpus" else 0,
        seed=job.seed,
        store=scratch,
        reporter=reporter,
    )


def _replace_bad_files(
    out: Store,
    name: str,
    found: CorpusVerification,
    rebuilt: CorpusManifest,
    scratch: Store,
    quarantine: Quarantine,
) -> list[str]:
    """Copy bad or missing files from the corpus that was built again; returns their paths below the corpus."""
    store, bad, made = out.below(name), {finding.path for finding in found.findings}, []
    for path in rebuilt.paths:
        # Where no manifest can be read, no file can be trusted.
        suspect = path in bad or found.manifest is None
        if not store.exists(path) or (suspect and store.read(path) != scratch.read(path)):
            quarantine.take(f"{name}/{path}")
            store.put_once(path, scratch.read(path))
            made.append(path)
    # The corpus is the same after source files were moved or touched, but its list of documents names their new paths.
    if not found.manifest or "manifest.json" in bad or canonical_json(found.manifest) != canonical_json(rebuilt):
        quarantine.take(f"{name}/manifest.json")
        write_corpus_manifest(store, rebuilt)
        made.append("manifest.json")
    return made


def _train_teacher(workspace: Workspace, checked: Checked, reporter: Reporter, cluster: OpenCluster) -> list[str]:
    """Train the adapters that the targets were made with, or, without targets, that a run would use.

    Adapters of earlier corpora that nothing names any more are not trained. Returns the folders.
    """
    manifest = checked.targets.manifest
    digests = manifest.teacher.get("adapters", []) if manifest else None
    made = train_missing(workspace, read_complete_corpus(workspace), digests, reporter, cluster)
    try:
        named_teacher(workspace.teacher, digests or [])
    except PartCorrupt as error:
        problem = (
            f"{error.problem}, and what can be trained in its place has other weights; `softshard run JOB.yaml` goes"
            " on with that, and makes new targets"
        )
        raise NotRepairable(uri=error.uri, problem=problem) from error
    return [f"teacher/{folder}" for folder in made]


def _set_adapters_aside(checked: Checked, quarantine: Quarantine) -> list[str]:
    """Set aside bad files of adapters, and their receipts; returns the files that the next run makes again."""
    left = []
    for stage in ("teacher", "adapter"):
        for finding in checked.findings[stage]:
            path = f"{stage}/{finding.path}"
            quarantine.take(path)
            folder, _, name = path.rpartition("/")
            if name not in {"receipt.json", "adapter.json"}:
                quarantine.take(f"{folder}/receipt.json")
            left += [path] if stage == "adapter" else []
    return left
