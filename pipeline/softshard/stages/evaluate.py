"""The evaluate stage: base, baseline and adapter on the hold-out, side by side, and the report.

The report is named by what it was made from; one that is there already is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from softshard.corpus.manifest import CorpusManifest
from softshard.corpus.read import iter_sequences
from softshard.errors import CorpusEmpty, ManifestMissing, PartCorrupt
from softshard.evaluate.comparison import human_metrics, model_metrics, nll_difference, pick_examples, plot_data
from softshard.evaluate.metrics import ModelMetrics
from softshard.evaluate.report import (
    BaselineChoice,
    HoldoutSummary,
    Report,
    SweepRow,
    TargetsSummary,
    TrainingStep,
)
from softshard.evaluate.samples import Continuations, Prompt, Samples, generate, human_continuations, make_prompts
from softshard.evaluate.scoring import HoldoutScores, retention_nll, score_holdout
from softshard.evaluate.write import write_report
from softshard.finetune.adapters.kinds import load_adapter
from softshard.finetune.record import Trained, TrainingReceipt, read_log
from softshard.finetune.sweep import sweep_rows
from softshard.models import load_model, resolve_device
from softshard.output.workspace import Workspace
from softshard.records.digest import canonical_digest
from softshard.shard.manifest import Manifest
from softshard.shard.read import Row, read_rows
from softshard.shard.schema import PartMetadata
from softshard.stages.train.stage import set_training_threads
from softshard.storage import Store
from softshard.teacher.style import training_precision
from softshard.telemetry import Progress, Reporter

__all__ = ["ensure_report", "read_report"]

_NUM_EXAMPLES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """One model's scores and samples."""

    scores: HoldoutScores
    samples: Samples
    retention_nll: float | None


def read_report(store: Store) -> Report | None:
    """The report of an output folder; None where there is none. Raises PartCorrupt."""
    try:
        return Report.model_validate_json(store.read("metrics.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PartCorrupt(uri=f"{store.uri}/metrics.json", problem="is not a report of this version") from error


def ensure_report(
    workspace: Workspace,
    corpora: tuple[CorpusManifest, CorpusManifest | None],
    manifest: Manifest,
    trained: Trained,
    reporter: Reporter,
    *,
    compute: bool,
) -> Report:
    """The report of the job's present settings, made where it is missing.

    Raises:
        CorpusEmpty: there is no hold-out to measure on.
    """
    store = workspace.report
    key = _report_key(workspace, corpora, manifest, trained)
    if store.exists("key.txt") and store.read("key.txt").decode() == key and store.exists("index.html"):
        report = read_report(store)
        if report is not None:
            return report
    if not compute:
        raise ManifestMissing(uri=f"{store.uri}/metrics.json", stage="evaluate")
    store.replace("key.txt", b"")
    report = _make_report(workspace, corpora, manifest, trained, reporter)
    store.replace("key.txt", key.encode())
    return report


def _report_key(
    workspace: Workspace,
    corpora: tuple[CorpusManifest, CorpusManifest | None],
    manifest: Manifest,
    trained: Trained,
) -> str:
    style, retention = corpora
    parts = [style.digest, None if retention is None else retention.digest, manifest.digest, trained]
    return canonical_digest([*parts, workspace.job.model_dump(mode="json", exclude={"cluster"})])


def _make_report(
    workspace: Workspace,
    corpora: tuple[CorpusManifest, CorpusManifest | None],
    manifest: Manifest,
    trained: Trained,
    reporter: Reporter,
) -> Report:
    settings, tokenizer = workspace.job.evaluate, workspace.student_model.tokenizer
    if not manifest.of_split("test"):
        raise CorpusEmpty(counts={}, split="test")
    prompts = make_prompts(
        _holdout(workspace, manifest),
        num_samples=settings.num_samples,
        prompt_tokens=settings.prompt_tokens,
        sample_tokens=settings.sample_tokens,
        seed=workspace.job.seed,
    )
    receipts: dict[str, TrainingReceipt | None] = {"base": None, "adapter": trained.adapter}
    if trained.baseline is not None:
        receipts = {"base": None, "ce": trained.baseline, "adapter": trained.adapter}
    measured = _measure_models(workspace, corpora[1], manifest, prompts, receipts, reporter)
    human = human_continuations(prompts, tokenizer=tokenizer)
    samples = {name: one.samples for name, one in measured.items()}
    metrics = {
        name: model_metrics(
            one.scores,
            one.samples,
            human=human,
            vocab_size=manifest.vocab_size,
            retention_nll_nats=one.retention_nll,
        )
        for name, one in measured.items()
    }
    scores = {name: one.scores for name, one in measured.items()}
    report = _report(workspace, corpora[0], manifest, trained, metrics, scores, prompts, human, samples)
    data = plot_data(human=human, samples=samples, scores=scores)
    write_report(report, plot_data=data, store=workspace.report)
    return report


def _holdout(workspace: Workspace, manifest: Manifest) -> Iterator[tuple[Row, PartMetadata]]:
    for receipt in manifest.of_split("test"):
        yield from read_rows(workspace.targets, receipt)


def _measure_models(
    workspace: Workspace,
    retention: CorpusManifest | None,
    manifest: Manifest,
    prompts: list[Prompt],
    receipts: dict[str, TrainingReceipt | None],
    reporter: Reporter,
) -> dict[str, _Measured]:
    import torch

    settings = workspace.job.train
    set_training_threads(settings)
    dtype, _ = training_precision(settings.dtype, device=settings.device)
    device = resolve_device(settings.device)
    measured = {}
    for name, receipt in receipts.items():
        model = load_model(workspace.student_model.folder, dtype=getattr(torch, dtype), device=device)
        if receipt is not None:
            folder = workspace.adapter.local_folder(receipt.folder, receipt.files)
            model = load_adapter(model, folder, device=device)
        labels = sum(part.num_labels for part in manifest.of_split("test"))
        with reporter.progress(f"evaluate {name}", total=labels, unit="positions") as progress:
            measured[name] = _measure(workspace, retention, manifest, prompts, model, device, progress)
    return measured


def _measure(
    workspace: Workspace,
    retention: CorpusManifest | None,
    manifest: Manifest,
    prompts: list[Prompt],
    model: Any,
    device: str,
    progress: Progress,
) -> _Measured:
    settings, tokenizer = workspace.job.evaluate, workspace.student_model.tokenizer
    scores = score_holdout(
        model,
        _holdout(workspace, manifest),
        tokenizer=tokenizer,
        num_valid=manifest.vocab_size,
        batch_tokens=settings.batch_tokens,
        num_bins=settings.calibration_bins,
        on_progress=lambda done: progress(done, note="scoring"),
    )
    kept = None
    if retention is not None:
        progress(scores.num_labels, note="scoring the retention text")
        kept = retention_nll(
            model,
            iter_sequences(workspace.retention, retention, split="test"),
            num_valid=manifest.vocab_size,
            batch_tokens=settings.batch_tokens,
            on_progress=lambda done: None,
        )
    progress(scores.num_labels, note=f"sampling {len(prompts)} continuations")
    samples = generate(
        model,
        prompts,
        tokenizer=tokenizer,
        sample_tokens=settings.sample_tokens,
        temperature=settings.temperature,
        seed=workspace.job.seed,
        device=device,
    )
    progress(scores.num_labels, note=f"NLL {scores.human_nll_nats:.3f}")
    return _Measured(scores=scores, samples=samples, retention_nll=kept)


def _report(
    workspace: Workspace,
    corpus: CorpusManifest,
    manifest: Manifest,
    trained: Trained,
    metrics: dict[str, ModelMetrics],
    scores: dict[str, HoldoutScores],
    prompts: list[Prompt],
    human: Continuations,
    samples: dict[str, Samples],
) -> Report:
    base = scores["base"]
    return Report(
        job=workspace.job.name,
        manifest=manifest.digest,
        settings=workspace.job.model_dump(mode="json"),
        holdout=HoldoutSummary(
            documents=len(base.documents),
            sequences=base.num_sequences,
            labels=base.num_labels,
            num_bytes=base.num_bytes,
            prompts=len(prompts),
            teacher_nll_nats=base.teacher_nll_nats,
        ),
        human=human_metrics(human),
        base=metrics["base"],
        ce=metrics.get("ce"),
        adapter=metrics["adapter"],
        adapter_minus_base=nll_difference(scores["adapter"], base),
        adapter_minus_ce=nll_difference(scores["adapter"], scores["ce"]) if "ce" in scores else None,
        baseline_choice=tuple(
            BaselineChoice(learning_rate=one.learning_rate, human_nll_nats=one.holdout_nll_nats)
            for one in trained.candidates
            if one.holdout_nll_nats is not None
        ),
        sweep=tuple(SweepRow(**row) for row in sweep_rows(trained)),
        corpus=tuple(row.model_dump(mode="json") for row in corpus.statistics),
        targets=_targets_summary(manifest),
        training=_training_curves(workspace, trained),
        examples=pick_examples(
            prompts,
            tokenizer=workspace.student_model.tokenizer,
            human=human,
            base=samples["base"],
            ce=samples.get("ce"),
            adapter=samples["adapter"],
        )[:_NUM_EXAMPLES],
    )


def _targets_summary(manifest: Manifest) -> TargetsSummary:
    fidelity = manifest.fidelity
    assert fidelity is not None
    assert manifest.bytes_per_position is not None
    return TargetsSummary(
        parts=manifest.totals.num_parts,
        positions=manifest.totals.num_labels,
        bytes_per_position=manifest.bytes_per_position,
        mean_entries=fidelity.mean_entries,
        mean_squared_error=fidelity.mean_squared_error,
        gradient_angle_degrees=fidelity.gradient_angle_degrees,
        mean_kl_nats=fidelity.mean_kl_nats,
    )


def _training_curves(workspace: Workspace, trained: Trained) -> dict[str, tuple[TrainingStep, ...]]:
    shown = {"adapter": trained.adapter}
    if trained.baseline is not None:
        shown["ce"] = trained.baseline
    return {
        name: tuple(
            TrainingStep(**{field: step[field] for field in TrainingStep.model_fields})
            for step in read_log(workspace.adapter, receipt)
        )
        for name, receipt in shown.items()
    }
