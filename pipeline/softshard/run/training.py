"""The train stage: the adapter on the stored targets, and the baseline on the same tokens.

Every training is named by a digest of everything that it depends on; one that is complete is not run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from softshard.config import OptimizerSettings, RetentionSettings, TrainSettings, digest_of
from softshard.corpus.manifest import CorpusManifest
from softshard.corpus.read import iter_sequences
from softshard.errors import AdapterMissing
from softshard.evaluate.scoring import score_holdout
from softshard.models import check_context, check_tokenizer, check_vocabulary, load_model, output_size, resolve_device
from softshard.run.workspace import Workspace
from softshard.shard.manifest import Manifest, canonical_json
from softshard.shard.read import read_rows
from softshard.storage import sha256_of
from softshard.teacher.style import training_precision
from softshard.telemetry import Reporter
from softshard.train.adapter import save_adapter
from softshard.train.checkpoint import Checkpoint
from softshard.train.dataset import SoftLabelDataset
from softshard.train.loop import FineTuned, Step, fine_tune
from softshard.train.objective import CROSS_ENTROPY, Objective
from softshard.train.reading import TargetSet
from softshard.train.record import Trained, TrainingReceipt, find_training, write_trained
from softshard.train.retention import Retention
from softshard.train.stream import TextBatches

__all__ = ["ensure_trained", "set_training_threads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainingPlan:
    """One training before it is run."""

    name: str
    alpha: float
    objective: Objective
    optimizer: OptimizerSettings
    retention: RetentionSettings | None
    retention_weight: float
    depends_on: dict[str, Any]

    @property
    def training_id(self) -> str:
        """128 bits, in hex, of a SHA-256 over everything that can change the adapter."""
        return digest_of(self.depends_on)[:32]

    @property
    def folder(self) -> str:
        """Folder below `adapter/`."""
        return f"{self.name}-{self.training_id[:16]}"

    @property
    def label(self) -> str:
        """A few words for the progress."""
        return f"{self.name} {self.optimizer.learning_rate:g}"


def ensure_trained(
    workspace: Workspace, manifest: Manifest, retention: CorpusManifest | None, reporter: Reporter, *, compute: bool
) -> Trained:
    """The adapter and the baseline of the job, trained where they are missing.

    Raises:
        TokenizerMismatch: the student's tokenizer is not the one that the targets were made with.
        VocabularyMismatch: the student has no logit for some token of the targets.
    """
    student = workspace.student_model
    data = workspace.targets.uri
    check_tokenizer(student.tokenizer, model=student.name, data=data, data_fingerprint=manifest.tokenizer_fingerprint)
    check_context(student.folder, context_tokens=workspace.job.corpus.context_tokens)
    size = output_size(student.folder)
    check_vocabulary(model=student.name, model_size=size, data=data, data_size=manifest.vocab_size)
    store = workspace.adapter
    main, baselines = _plans(workspace, manifest, retention)
    found = {plan.folder: find_training(store, plan.folder) for plan in (main, *baselines)}
    if not compute and None in found.values():
        raise AdapterMissing(uri=store.uri)
    receipts = [
        found[plan.folder] or _train(workspace, manifest, retention, plan, reporter) for plan in (main, *baselines)
    ]
    candidates = tuple(receipts[1:])
    best = min(candidates, key=lambda one: (one.holdout_nll_nats or 0.0, one.learning_rate)) if candidates else None
    trained = Trained(adapter=receipts[0], baseline=best, candidates=candidates)
    write_trained(store, trained)
    return trained


def _plans(
    workspace: Workspace, manifest: Manifest, retention: CorpusManifest | None
) -> tuple[_TrainingPlan, list[_TrainingPlan]]:
    settings, student = workspace.job.train, workspace.student_model
    dtype, device = training_precision(settings.dtype, device=settings.device)
    shared = {
        "manifest": manifest.digest,
        "weights": student.weights,
        "dtype": dtype,
        "device": device,
        "num_threads": settings.num_threads,
        "adapter": settings.adapter,
        "lora": settings.lora,
        "truncated": settings.truncated if manifest.target["kind"] in {"topk", "nucleus"} else None,
        "temperature": settings.temperature,
        "shuffle_buffer": settings.shuffle_buffer,
        "chunk_positions": settings.chunk_positions,
        "seed": workspace.job.seed,
    }

    def plan(name: str, alpha: float, optimizer: OptimizerSettings, weight: float) -> _TrainingPlan:
        used = settings.retention if weight > 0 else None
        text = retention.digest if retention is not None and used is not None else None
        objective = CROSS_ENTROPY if alpha == 1 else _objective(settings, manifest)
        depends_on = {
            **shared,
            "alpha": alpha,
            "objective": asdict(objective),
            "optimizer": optimizer.model_dump(exclude={"checkpoint_steps"}),
            "retention_weight": weight,
            "retention": None if used is None else [text, used.objective, used.batch_tokens],
        }
        return _TrainingPlan(
            name=name,
            alpha=alpha,
            objective=objective,
            optimizer=optimizer,
            retention=used,
            retention_weight=weight,
            depends_on=depends_on,
        )

    weight = settings.retention.weight if settings.retention is not None else 0.0
    alpha = 1.0 if settings.objective == "ce" else settings.alpha
    main = plan(settings.objective, alpha, settings.optimizer, weight)
    if settings.baseline is None:
        return main, []
    rates = [settings.optimizer.model_copy(update={"learning_rate": rate}) for rate in settings.baseline.learning_rates]
    return main, [plan("baseline", 1.0, optimizer, settings.baseline.retention_weight) for optimizer in rates]


def _objective(settings: TrainSettings, manifest: Manifest) -> Objective:
    temperature = settings.temperature * manifest.target["temperature"] if settings.match_temperature else 1.0
    return Objective(divergence=settings.divergence, jsd_beta=settings.jsd_beta, temperature=temperature)


def _train(
    workspace: Workspace,
    manifest: Manifest,
    retention: CorpusManifest | None,
    plan: _TrainingPlan,
    reporter: Reporter,
) -> TrainingReceipt:
    import torch

    settings, student, store = workspace.job.train, workspace.student_model, workspace.adapter
    set_training_threads(settings)
    dtype, _ = training_precision(settings.dtype, device=settings.device)
    checkpoint = Checkpoint(store=store, path=f".checkpoints/{plan.folder}.pt")
    stream = SoftLabelDataset(
        TargetSet(store=workspace.targets, manifest=manifest),
        seed=workspace.job.seed,
        batch_tokens=plan.optimizer.batch_tokens,
        shuffle_buffer=settings.shuffle_buffer,
        alpha=plan.alpha,
        truncated=settings.truncated,
        temperature=settings.temperature,
        rank=0,
        world_size=1,
    )
    with reporter.progress(f"train {plan.label}", total=None, unit="steps") as progress:

        def on_step(step: Step) -> None:
            kept = "" if step.retention_loss is None else f", retention {step.retention_loss:.3f}"
            progress(step.step, total=step.total_steps, note=f"loss {step.loss:.3f}{kept}")

        device = resolve_device(settings.device)
        tuned = fine_tune(
            load_model(student.folder, dtype=getattr(torch, dtype), device=device),
            stream,
            lora=settings.lora,
            adapter=settings.adapter,
            objective=plan.objective,
            optimizer=plan.optimizer,
            retention=_retention(workspace, retention, plan),
            seed=workspace.job.seed,
            num_valid=manifest.vocab_size,
            chunk_positions=settings.chunk_positions,
            checkpoint=checkpoint,
            identity=plan.training_id,
            on_step=on_step,
        )
        progress(len(tuned.log), total=len(tuned.log), note="scoring the hold-out")
        holdout_nll = _holdout_nll(workspace, manifest, tuned.model)
    receipt = _save(workspace, manifest, plan, tuned, holdout_nll)
    checkpoint.remove()
    return receipt


def set_training_threads(settings: TrainSettings) -> None:
    """Give torch the job's number of CPU threads, or all cores."""
    import os

    import torch

    torch.set_num_threads(settings.num_threads or len(os.sched_getaffinity(0)))


def _retention(workspace: Workspace, retention: CorpusManifest | None, plan: _TrainingPlan) -> Retention | None:
    if retention is None or plan.retention is None:
        return None
    sequences = list(iter_sequences(workspace.retention, retention, split="train"))
    batches = TextBatches(
        sequences, seed=workspace.job.seed, batch_tokens=plan.retention.batch_tokens, name="retention"
    )
    return Retention(batches=batches, weight=plan.retention_weight, objective=plan.retention.objective)


def _holdout_nll(workspace: Workspace, manifest: Manifest, model: Any) -> float | None:
    receipts = manifest.of_split("test")
    if not receipts:
        return None
    scores = score_holdout(
        model,
        (row for receipt in receipts for row in read_rows(workspace.targets, receipt)),
        tokenizer=workspace.student_model.tokenizer,
        num_valid=manifest.vocab_size,
        batch_tokens=workspace.job.evaluate.batch_tokens,
        num_bins=workspace.job.evaluate.calibration_bins,
        on_progress=lambda done: None,
    )
    return scores.human_nll_nats


def _save(
    workspace: Workspace, manifest: Manifest, plan: _TrainingPlan, tuned: FineTuned, holdout_nll: float | None
) -> TrainingReceipt:
    store = workspace.adapter
    files = save_adapter(tuned.model, base_model=workspace.student_model.name)
    for name, content in files.items():
        store.put_once(f"{plan.folder}/{name}", content)
    log = "".join(json.dumps(asdict(step)) + "\n" for step in tuned.log)
    store.replace(f"{plan.folder}/log.jsonl", log.encode())
    receipt = TrainingReceipt(
        training_id=plan.training_id,
        folder=plan.folder,
        files={name: sha256_of(content) for name, content in files.items()},
        manifest=manifest.digest,
        sources=manifest.sources,
        settings=workspace.job.train.model_dump(mode="json"),
        objective="ce" if plan.alpha == 1 else "kl",
        alpha=plan.alpha,
        learning_rate=plan.optimizer.learning_rate,
        retention_weight=plan.retention_weight,
        num_steps=len(tuned.log),
        num_tokens=sum(step.tokens for step in tuned.log),
        holdout_nll_nats=holdout_nll,
    )
    store.put_once(f"{plan.folder}/receipt.json", canonical_json(receipt))
    return receipt
