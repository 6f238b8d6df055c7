"""The evaluate stage: measures base, baseline and adapter on the hold-out and writes the report.

A digest of everything that the report was made from is stored with it; a report that is up to date is not made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from softshard.config import EvaluateSettings, Job
from softshard.corpus.manifest import CorpusManifest
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
from softshard.evaluate.scoring import HoldoutScores
from softshard.evaluate.write import write_report
from softshard.finetune.record import Trained, TrainingReceipt, read_log
from softshard.finetune.sweep import sweep_rows
from softshard.output.workspace import Workspace
from softshard.records.digest import canonical_digest
from softshard.shard.manifest import Manifest
from softshard.stages.corpus.stage import Corpora
from softshard.stages.holdout import Holdout, make_holdout
from softshard.stages.train.student import Student, make_student
from softshard.storage import Store
from softshard.telemetry import Reporter

__all__ = ["ensure_report", "read_report"]

_NUM_EXAMPLES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Protocol:
    """What every model is measured on, and how."""

    holdout: Holdout
    prompts: list[Prompt]
    settings: EvaluateSettings
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """One model's scores and samples."""

    scores: HoldoutScores
    samples: Samples
    retention_nll: float | None


def read_report(store: Store) -> Report | None:
    """The report in a `report/` folder; None where there is none. Raises PartCorrupt."""
    try:
        return Report.model_validate_json(store.read("metrics.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PartCorrupt(uri=f"{store.uri}/metrics.json", problem="is not a report of this version") from error


def ensure_report(
    workspace: Workspace,
    corpora: Corpora,
    manifest: Manifest,
    trained: Trained,
    reporter: Reporter,
    *,
    compute: bool,
) -> Report:
    """The report of the job's present settings, made where it is missing.

    Raises:
        CorpusEmpty: there is no hold-out to measure on.
        ManifestMissing: the report is missing and `compute` is false.
    """
    store = workspace.report
    key = _report_key(workspace.job, corpora, manifest, trained)
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


def _report_key(job: Job, corpora: Corpora, manifest: Manifest, trained: Trained) -> str:
    retention = None if corpora.retention is None else corpora.retention.manifest.digest
    parts = [corpora.style.manifest.digest, retention, manifest.digest, trained]
    return canonical_digest([*parts, job.model_dump(mode="json", exclude={"cluster"})])


def _make_report(
    workspace: Workspace, corpora: Corpora, manifest: Manifest, trained: Trained, reporter: Reporter
) -> Report:
    if not manifest.of_split("test"):
        raise CorpusEmpty(counts={}, split="test")
    job, adapters = workspace.job, workspace.adapter
    protocol = _make_protocol(make_holdout(workspace, manifest, corpora.retention), job)
    student = make_student(workspace)
    measured = {}
    for name, receipt in _compared_models(trained).items():
        folder = None if receipt is None else adapters.local_folder(receipt.folder, receipt.files)
        measured[name] = _measure(name, student, folder, protocol, reporter)
    human = human_continuations(protocol.prompts, tokenizer=protocol.holdout.tokenizer)
    report = _compose_report(
        job,
        protocol,
        measured,
        human,
        trained=trained,
        corpus=corpora.style.manifest,
        curves=_training_curves(adapters, trained),
    )
    samples = {name: model.samples for name, model in measured.items()}
    scores = {name: model.scores for name, model in measured.items()}
    data = plot_data(human=human, samples=samples, scores=scores)
    write_report(report, plot_data=data, store=workspace.report)
    return report


def _make_protocol(holdout: Holdout, job: Job) -> _Protocol:
    settings = job.evaluate
    prompts = make_prompts(
        holdout.rows(),
        num_samples=settings.num_samples,
        prompt_tokens=settings.prompt_tokens,
        sample_tokens=settings.sample_tokens,
        seed=job.seed,
        context_tokens=job.corpus.context_tokens,
    )
    return _Protocol(holdout=holdout, prompts=prompts, settings=settings, seed=job.seed)


def _compared_models(trained: Trained) -> dict[str, TrainingReceipt | None]:
    """The trainings of the models in the report, by the model's name in it; None for the base."""
    baseline = {} if trained.baseline is None else {"ce": trained.baseline}
    return {"base": None, **baseline, "adapter": trained.adapter}


def _measure(name: str, student: Student, adapter: Path | None, protocol: _Protocol, reporter: Reporter) -> _Measured:
    model, holdout, settings = student.load(adapter), protocol.holdout, protocol.settings
    with reporter.progress(f"evaluate {name}", total=holdout.num_labels, unit="positions") as progress:
        scores = holdout.score(model, on_progress=lambda done: progress(done, note="scoring"))
        if holdout.retention is not None:
            progress(scores.num_labels, note="scoring the retention text")
        kept = holdout.retention_nll(model)
        progress(scores.num_labels, note=f"sampling {len(protocol.prompts)} continuations")
        samples = generate(
            model,
            protocol.prompts,
            tokenizer=holdout.tokenizer,
            sample_tokens=settings.sample_tokens,
            temperature=settings.temperature,
            seed=protocol.seed,
            device=student.device,
        )
        progress(scores.num_labels, note=f"NLL {scores.human_nll_nats:.3f}")
    return _Measured(scores=scores, samples=samples, retention_nll=kept)


def _compose_report(
    job: Job,
    protocol: _Protocol,
    measured: Mapping[str, _Measured],
    human: Continuations,
    *,
    trained: Trained,
    corpus: CorpusManifest,
    curves: dict[str, tuple[TrainingStep, ...]],
) -> Report:
    base, adapter, baseline = measured["base"], measured["adapter"], measured.get("ce")
    manifest = protocol.holdout.manifest

    def metrics(model: _Measured) -> ModelMetrics:
        return model_metrics(
            model.scores,
            model.samples,
            human=human,
            vocab_size=manifest.vocab_size,
            retention_nll_nats=model.retention_nll,
        )

    return Report(
        job=job.name,
        manifest=manifest.digest,
        settings=job.model_dump(mode="json"),
        holdout=_holdout_summary(base.scores, num_prompts=len(protocol.prompts)),
        human=human_metrics(human),
        base=metrics(base),
        ce=None if baseline is None else metrics(baseline),
        adapter=metrics(adapter),
        adapter_minus_base=nll_difference(adapter.scores, base.scores),
        adapter_minus_ce=None if baseline is None else nll_difference(adapter.scores, baseline.scores),
        baseline_choice=tuple(
            BaselineChoice(learning_rate=candidate.learning_rate, human_nll_nats=candidate.holdout_nll_nats)
            for candidate in trained.candidates
            if candidate.holdout_nll_nats is not None
        ),
        sweep=tuple(SweepRow(**row) for row in sweep_rows(trained)),
        corpus=tuple(row.model_dump(mode="json") for row in corpus.statistics),
        targets=_targets_summary(manifest),
        training=curves,
        examples=pick_examples(
            protocol.prompts,
            tokenizer=protocol.holdout.tokenizer,
            human=human,
            base=base.samples,
            ce=None if baseline is None else baseline.samples,
            adapter=adapter.samples,
        )[:_NUM_EXAMPLES],
    )


def _holdout_summary(base: HoldoutScores, *, num_prompts: int) -> HoldoutSummary:
    return HoldoutSummary(
        documents=len(base.documents),
        sequences=base.num_sequences,
        labels=base.num_labels,
        num_bytes=base.num_bytes,
        prompts=num_prompts,
        teacher_nll_nats=base.teacher_nll_nats,
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


def _training_curves(store: Store, trained: Trained) -> dict[str, tuple[TrainingStep, ...]]:
    receipts = {"adapter": trained.adapter}
    if trained.baseline is not None:
        receipts["ce"] = trained.baseline
    return {
        name: tuple(
            TrainingStep(**{field: step[field] for field in TrainingStep.model_fields})
            for step in read_log(store, receipt)
        )
        for name, receipt in receipts.items()
    }
