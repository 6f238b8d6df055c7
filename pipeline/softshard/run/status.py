"""How far an output folder is: what each stage has left there. Reads, and needs no model.

It says what is there, not whether a changed job file would have some of it made anew: that is for `softshard run`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import JobInvalid, ManifestMissing
from softshard.jobfile import load_job
from softshard.run.workspace import owner_of
from softshard.shard.manifest import Manifest, Receipt, mean_fidelity, read_manifest, read_receipt
from softshard.shard.read import read_rows
from softshard.shard.verify import Verification, verify_targets
from softshard.storage import LocalStore
from softshard.telemetry import Reporter

__all__ = [
    "StageStatus",
    "Status",
    "read_status",
    "render_status",
    "render_verification",
    "verify_output",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage: whether it has been completed, and its figures."""

    stage: str
    complete: bool
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """State of an output folder."""

    out: str
    job: str
    stages: tuple[StageStatus, ...]
    sequences: tuple[str, ...]
    """Ids of a few stored sequences, to be shown."""


def read_status(out: str) -> Status:
    """State of an output folder.

    Raises:
        JobInvalid: there is no job in it.
    """
    job = owner_of(out)
    if job is None:
        raise JobInvalid(file=out, place="", problem="holds no output of softshard (no job.yaml with a name)")
    store = LocalStore(out)
    targets, sequences = _targets(store.below("targets"))
    return Status(
        out=out,
        job=job,
        stages=(_corpus(store.below("corpus")), _teacher(store), targets, _adapter(store), _report(store)),
        sequences=sequences,
    )


def _corpus(store: LocalStore) -> StageStatus:
    manifest = read_corpus_manifest(store)
    if manifest is None:
        return StageStatus(stage="corpus", complete=False, figures={})
    figures: dict[str, Any] = {"documents": manifest.counts.get("kept", 0)}
    figures["sequences"] = sum(part.num_sequences for part in manifest.slices)
    figures["positions"] = sum(part.num_labels for part in manifest.slices)
    figures["slices"] = len(manifest.slices)
    return StageStatus(stage="corpus", complete=True, figures=figures)


def _teacher(store: LocalStore) -> StageStatus:
    folds = load_job(store.local_path("job.yaml"), check_paths=False).teacher.folds
    adapters = sum(path.endswith("/receipt.json") for path in store.list("teacher"))
    return StageStatus(stage="teacher", complete=adapters >= folds, figures={"adapters": adapters, "folds": folds})


def _targets(store: LocalStore) -> tuple[StageStatus, tuple[str, ...]]:
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(store)
        receipts = manifest.parts
    except ManifestMissing:
        receipts = tuple(read_receipt(store, path) for path in store.list("receipts"))
    labels = sum(receipt.num_labels for receipt in receipts)
    figures: dict[str, Any] = {"parts": len(receipts), "positions": labels}
    fidelity = mean_fidelity(receipts)
    if fidelity is not None:
        figures["bytes"] = sum(receipt.num_bytes for receipt in receipts)
        figures["bytes_per_position"] = round(figures["bytes"] / labels, 2)
        figures["entries_per_position"] = round(fidelity.mean_entries, 2)
        figures["mean_squared_error"] = round(fidelity.mean_squared_error, 6)
        figures["gradient_angle_degrees"] = round(fidelity.gradient_angle_degrees, 2)
        if fidelity.mean_kl_nats is not None:
            figures["kl_nats"] = round(fidelity.mean_kl_nats, 6)
        for rank, mass in sorted((fidelity.mass_by_rank or {}).items(), key=lambda item: int(item[0])):
            figures[f"mass_of_top_{rank}"] = round(mass, 3)
    status = StageStatus(stage="targets", complete=manifest is not None, figures=figures)
    return status, _some_sequences(store, receipts)


def _some_sequences(store: LocalStore, receipts: tuple[Receipt, ...]) -> tuple[str, ...]:
    if not receipts:
        return ()
    rows = itertools.islice(read_rows(store, receipts[0]), 3)
    return tuple(sequence.sequence_id for (sequence, _), _ in rows)


def _adapter(store: LocalStore) -> StageStatus:
    from softshard.train.record import read_trained

    trained = read_trained(store.below("adapter"))
    if trained is None:
        return StageStatus(stage="train", complete=False, figures={})
    figures: dict[str, Any] = {"adapter": trained.adapter.folder, "steps": trained.adapter.num_steps}
    if trained.adapter.holdout_nll_nats is not None:
        figures["holdout_nll"] = round(trained.adapter.holdout_nll_nats, 4)
    return StageStatus(stage="train", complete=True, figures=figures)


def _report(store: LocalStore) -> StageStatus:
    complete = store.exists("report/metrics.json")
    return StageStatus(stage="evaluate", complete=complete, figures={"report": "report/index.html"} if complete else {})


def render_status(status: Status) -> str:
    """The state as lines of at most 80 columns."""
    lines = [f"{status.out}: job {status.job}", ""]
    for stage in status.stages:
        lines.append(f"{stage.stage:<9} {'complete' if stage.complete else 'not complete'}")
        for name, value in stage.figures.items():
            shown = f"{value:,}" if isinstance(value, int | float) else str(value)
            lines.append(f"{'':<9} {name.replace('_', ' '):<24} {shown}")
    if status.sequences:
        lines += ["", "One of its sequences:", f"softshard show {status.out} --sequence {status.sequences[0][:12]}"]
    return "\n".join(lines) + "\n"


def verify_output(out: str, reporter: Reporter, *, deep: bool) -> Verification:
    """Verify the targets of an output folder. Raises JobInvalid if it holds no job."""
    if owner_of(out) is None:
        raise JobInvalid(file=out, place="", problem="holds no output of softshard (no job.yaml with a name)")
    with reporter.progress("verify", total=None, unit="parts") as progress:
        return verify_targets(
            LocalStore(out).below("targets"), deep=deep, on_part=lambda done, total: progress(done, total=total)
        )


def render_verification(out: str, verification: Verification) -> str:
    """What was verified, a line a problem."""
    read = "decoded" if verification.deep else "read and hashed"
    lines = [
        f"{out}: {verification.num_parts} parts {read}, {verification.num_sequences:,} sequences,"
        f" {verification.num_labels:,} positions, {verification.num_bytes:,} bytes",
        *verification.problems,
    ]
    if verification.unnamed:
        more = f"{len(verification.unnamed)} file(s) that the manifest does not name"
        lines.append(f"{more}, first {verification.unnamed[0]}: no reader opens them, they may be deleted")
    lines.append(f"{len(verification.problems)} problem(s)" if verification.problems else "all is as it claims")
    return "\n".join(lines) + "\n"
