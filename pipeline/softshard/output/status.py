"""The status of an output folder: which stages are complete, with their figures. Reads files and needs no model.

It says what is there, not whether a changed job file would make some of it again; that is decided by `softshard run`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softshard.config.job_file import parse_values
from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import JobInvalid, ManifestMissing
from softshard.finetune.sweep import sweep_rows
from softshard.shard.manifest import Manifest, Receipt, mean_fidelity, read_manifest, read_receipt, sum_receipts
from softshard.shard.read import read_rows
from softshard.storage import Store, open_store
from softshard.teacher.record import parse_fold

__all__ = [
    "StageStatus",
    "Status",
    "job_values",
    "read_status",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """Whether a stage is complete, and its figures."""

    stage: str
    complete: bool
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of an output folder."""

    out: str
    job: str
    stages: tuple[StageStatus, ...]
    sequences: tuple[str, ...]
    """Ids of a few stored sequences, as examples for `softshard show`."""


def read_status(out: str) -> Status:
    """The state of an output folder.

    Raises:
        JobInvalid: there is no job in it.
    """
    store = open_store(out)
    job = job_values(store)
    targets, sequences = _targets(store.below("targets"))
    return Status(
        out=out,
        job=job["name"],
        stages=(_corpus(store.below("corpus")), _teacher(store, job), targets, _adapter(store), _report(store)),
        sequences=sequences,
    )


def job_values(store: Store) -> dict[str, Any]:
    """What the `job.yaml` of an output says, as plain values; it need not be of this version.

    Raises:
        JobInvalid: there is none with a name.
    """
    try:
        values = parse_values(store.read("job.yaml"))
    except (FileNotFoundError, NotADirectoryError):
        values = None
    if values is None:
        raise JobInvalid(file=store.uri, place="", problem="holds no output of softshard (no job.yaml with a name)")
    return values


def _corpus(store: Store) -> StageStatus:
    manifest = read_corpus_manifest(store)
    if manifest is None:
        return StageStatus(stage="corpus", complete=False, figures={})
    figures: dict[str, Any] = {"documents": manifest.counts.get("kept", 0)}
    figures["sequences"] = sum(part.num_sequences for part in manifest.slices)
    figures["positions"] = sum(part.num_labels for part in manifest.slices)
    figures["slices"] = len(manifest.slices)
    return StageStatus(stage="corpus", complete=True, figures=figures)


def _teacher(store: Store, job: dict[str, Any]) -> StageStatus:
    """Counts folds that have an adapter; a fold may have several, from earlier settings or corpora."""
    num_folds = int((job.get("teacher") or {}).get("folds", 0))
    receipts = (path.split("/") for path in store.list("teacher") if path.endswith("/receipt.json"))
    folds = {parse_fold(parts[-2]) for parts in receipts} & set(range(num_folds))
    figures = {"adapters": len(folds), "folds": num_folds}
    return StageStatus(stage="teacher", complete=len(folds) == num_folds, figures=figures)


def _targets(store: Store) -> tuple[StageStatus, tuple[str, ...]]:
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(store)
        receipts: Sequence[Receipt] = manifest.parts
    except ManifestMissing:
        receipts = tuple(read_receipt(store, path) for path in store.list("receipts"))
    totals = sum_receipts(receipts)
    figures: dict[str, Any] = {"parts": totals.num_parts, "positions": totals.num_labels}
    fidelity = mean_fidelity(receipts)
    if fidelity is not None:
        figures["bytes"] = totals.num_bytes
        figures["bytes_per_position"] = round(totals.num_bytes / totals.num_labels, 2)
        figures["entries_per_position"] = round(fidelity.mean_entries, 2)
        figures["mean_squared_error"] = round(fidelity.mean_squared_error, 6)
        figures["gradient_angle_degrees"] = round(fidelity.gradient_angle_degrees, 2)
        if fidelity.mean_kl_nats is not None:
            figures["kl_nats"] = round(fidelity.mean_kl_nats, 6)
        for rank, mass in sorted((fidelity.mass_by_rank or {}).items(), key=lambda item: int(item[0])):
            figures[f"mass_of_top_{rank}"] = round(mass, 3)
    status = StageStatus(stage="targets", complete=manifest is not None, figures=figures)
    return status, _some_sequences(store, receipts)


def _some_sequences(store: Store, receipts: Sequence[Receipt]) -> tuple[str, ...]:
    if not receipts:
        return ()
    rows = itertools.islice(read_rows(store, receipts[0]), 3)
    return tuple(sequence.sequence_id for (sequence, _), _ in rows)


def _adapter(store: Store) -> StageStatus:
    from softshard.finetune.record import read_trained

    trained = read_trained(store.below("adapter"))
    if trained is None:
        return StageStatus(stage="train", complete=False, figures={})
    figures: dict[str, Any] = {"adapter": trained.adapter.folder, "steps": trained.adapter.num_steps}
    if trained.adapter.holdout_nll_nats is not None:
        figures["holdout_nll"] = round(trained.adapter.holdout_nll_nats, 4)
    if trained.sweep:
        figures["sweep"] = sweep_rows(trained)
    return StageStatus(stage="train", complete=True, figures=figures)


def _report(store: Store) -> StageStatus:
    complete = store.exists("report/metrics.json")
    return StageStatus(stage="evaluate", complete=complete, figures={"report": "report/index.html"} if complete else {})
