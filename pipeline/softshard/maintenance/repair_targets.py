"""Repairing targets: what is bad or missing in a `targets/` folder is computed by the task that made it.

With a manifest, exactly the bad parts that it names are computed, whatever else a run would do. Without a manifest, the
unfinished run is completed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softshard.cluster.cluster import OpenCluster
from softshard.corpus.manifest import CorpusManifest, read_corpus_manifest
from softshard.errors import NotRepairable
from softshard.output.workspace import Workspace
from softshard.records.canonical import canonical_json
from softshard.records.spool import Spool
from softshard.shard.card import write_card
from softshard.shard.commit import find_receipt, receipt_path
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.shard.quarantine import Quarantine
from softshard.shard.verify import Verification
from softshard.stages.targets.parts import Missing, find_missing, score_parts
from softshard.stages.targets.stage import ensure_targets, make_scoring_spec
from softshard.stages.targets.tasks import ScoringSpec
from softshard.stages.targets.threshold import ensure_tau
from softshard.stages.teacher.stage import ensure_teacher, named_teacher
from softshard.telemetry import Reporter

__all__ = ["read_complete_corpus", "repair_targets"]


def read_complete_corpus(workspace: Workspace) -> CorpusManifest:
    """The corpus of an output. Raises NotRepairable where it is not complete."""
    corpus = read_corpus_manifest(workspace.corpus)
    if corpus is None:
        problem = "is not complete, so nothing that rests on it can be made again; run `softshard run JOB.yaml`"
        raise NotRepairable(uri=workspace.corpus.uri, problem=problem)
    return corpus


def repair_targets(
    workspace: Workspace, found: Verification, quarantine: Quarantine, reporter: Reporter, cluster: OpenCluster
) -> list[str]:
    """Mend what verification found; the paths, below the output, that were made again.

    Raises:
        NotRepairable: a bad part would not be the same part if it were computed now.
        PartsFailed: some parts could not be computed.
    """
    if not found.findings:
        return []
    bad = {finding.part_id for finding in found.findings if finding.part_id and finding.path.startswith("data/")}
    for finding in found.findings:
        if finding.path.startswith("pilot/"):
            quarantine.take(f"targets/{finding.path}")
    if found.manifest is None:
        if not any(workspace.targets.names(name) for name in ("receipts", "manifests")):
            return []
        return _finish_run(workspace, found, bad, quarantine, reporter, cluster)
    made = []
    if bad:
        receipts = {receipt.part_id: receipt for receipt in found.manifest.parts if receipt.part_id in bad}
        made += _compute(workspace, found.manifest, receipts, quarantine, reporter, cluster)
    return made + _write_records(workspace, found, bad, quarantine)


def _compute(
    workspace: Workspace,
    manifest: Manifest,
    bad: Mapping[str, Receipt],
    quarantine: Quarantine,
    reporter: Reporter,
    cluster: OpenCluster,
) -> list[str]:
    """Compute exactly the bad parts. Where one has other bytes than before, a new manifest names them."""
    store = workspace.targets
    corpus = read_complete_corpus(workspace)
    teacher = named_teacher(workspace.teacher, manifest.teacher.get("adapters", []))
    spec = make_scoring_spec(workspace, corpus, teacher)
    if not spec.sketch.is_resolved:
        spec = replace(spec, sketch=manifest.sketch)
    missing = _as_missing(spec, manifest, bad, corpus, uri=store.uri)
    running = cluster()
    for receipt in bad.values():
        quarantine.take(f"targets/{receipt.path}")
        quarantine.take(f"targets/{receipt_path(receipt.part_id)}")
    score_parts(running, spec, missing, reporter)
    found = {part_id: find_receipt(store, part_id) for part_id in bad}
    again = {part_id: receipt for part_id, receipt in found.items() if receipt is not None}
    if again != bad:
        parts = Spool(Receipt, (again.get(receipt.part_id, receipt) for receipt in manifest.parts))
        means = {"fidelity": mean_fidelity(parts), "bytes_per_position": bytes_per_position(parts)}
        changed = manifest.model_copy(update={"parts": parts, **means})
        write_manifest(store, changed)
        write_card(store, changed)
    return [f"targets/{receipt.path}" for receipt in again.values()]


def _as_missing(
    spec: ScoringSpec, manifest: Manifest, bad: Mapping[str, Receipt], corpus: CorpusManifest, *, uri: str
) -> Missing:
    """The bad parts as those that a run lacks, in the manifest's order, which names them. Raises NotRepairable."""
    wanted = {receipt.slice for receipt in bad.values()}
    slices = {part.sha256: part for part in corpus.slices if part.sha256 in wanted}
    if lost := sorted(wanted - set(slices)):
        raise NotRepairable(
            uri=uri,
            problem=f"has a damaged part of slice {lost[0][:16]}, which the corpus no longer holds; run the job",
        )
    places, flags = [], bytearray(len(manifest.parts))
    for index, receipt in enumerate(manifest.parts):
        part = slices.get(receipt.slice)
        places.append(part or next(iter(slices.values())))
        if receipt.part_id in bad and part is not None:
            if spec.part_spec(index, part).part_id != receipt.part_id:
                raise NotRepairable(uri=f"{uri}/{receipt.path}", problem=_why_another(manifest, receipt, spec))
            flags[index] = 1
    labels = sum(receipt.num_labels for receipt in bad.values())
    first = next(iter(bad.values())).path
    return Missing(slices=places, flags=flags, num_parts=len(bad), num_labels=labels, first_path=first)


def _why_another(manifest: Manifest, receipt: Receipt, spec: ScoringSpec) -> str:
    """What differs between what a part was made with and what there is now."""
    here: dict[str, Any] = dict(spec.teachers[receipt.fold].identity)
    adapters = set(here.pop("adapters", []))
    there: dict[str, Any] = {
        "tokenizer": manifest.tokenizer_fingerprint,
        "seed": manifest.seed,
        "target": manifest.target,
    }
    here |= {"tokenizer": spec.tokenizer_fingerprint, "seed": spec.seed, "target": spec.sketch.model_dump(mode="json")}
    there |= manifest.teacher
    differences = [
        f"{name} {there[name]}, now {here[name]}" for name in here if there.get(name, here[name]) != here[name]
    ]
    if adapters - set(manifest.teacher.get("adapters", [])):
        differences.append("other adapters of the style teacher")
    made_with = differences[0] if differences else "another version of pyarrow or of softshard"
    return (
        f"is damaged and would now get another id, because it was made with {made_with};"
        " repair it with the same settings and environment, or run the job, which then recomputes all parts"
    )


def _write_records(workspace: Workspace, found: Verification, computed: set[str], quarantine: Quarantine) -> list[str]:
    """Receipts, and the manifest's own files, that are damaged while what they should say is known."""
    assert found.manifest is not None
    store, made = workspace.targets, []
    wanted = {finding.part_id for finding in found.findings if finding.path.startswith("receipts/")} - computed
    for receipt in found.manifest.parts if wanted else ():
        if receipt.part_id in wanted:
            path = receipt_path(receipt.part_id)
            quarantine.take(f"targets/{path}")
            store.create_exclusive(path, canonical_json(receipt))
            made.append(f"targets/{path}")
    records = sorted({finding.path for finding in found.findings if finding.path.startswith("manifest")})
    for path in records:
        quarantine.take(f"targets/{path}")
    if records:
        write_manifest(store, found.manifest)
    return made + [f"targets/{path}" for path in records]


def _finish_run(
    workspace: Workspace,
    found: Verification,
    bad: set[str],
    quarantine: Quarantine,
    reporter: Reporter,
    cluster: OpenCluster,
) -> list[str]:
    """Set aside what is bad, and let the targets stage make what is missing, up to the manifest."""
    store = workspace.targets
    damaged = [orphan.path for orphan in found.unnamed if orphan.kind == "damaged manifest"]
    for path in (*(finding.path for finding in found.findings), *map(receipt_path, sorted(bad)), *damaged):
        quarantine.take(f"targets/{path}")
    corpus = read_complete_corpus(workspace)
    teacher = ensure_teacher(workspace, corpus, reporter, cluster, compute=True)
    spec = make_scoring_spec(workspace, corpus, teacher)
    sketch = ensure_tau(spec, corpus, reporter, cluster, job=workspace.job.name, compute=True)
    spec = replace(spec, sketch=sketch)
    # A part without a receipt is not committed, and may be damaged: it must not be in the way of its successor.
    for task in find_missing(store, spec, corpus.slices).tasks(spec):
        quarantine.take(f"targets/{spec.part_spec(task.index, task.slice).path}")
    before = set(workspace.out.list("targets"))
    ensure_targets(workspace, corpus, teacher, reporter, cluster, compute=True)
    return sorted(set(workspace.out.list("targets")) - before)
