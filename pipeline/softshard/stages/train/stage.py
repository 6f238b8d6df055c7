"""The train stage: the adapter on the stored targets, and the baseline on the same tokens.

Every training is named by a digest of everything that it depends on; one that is complete is not run again, whatever
it was for then. Its card is renewed whenever the stage runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from softshard.config import TrainSettings
from softshard.corpus.manifest import CorpusManifest
from softshard.corpus.read import iter_sequences
from softshard.data.text import TextBatches
from softshard.errors import AdapterMissing
from softshard.evaluate.scoring import retention_nll, score_holdout
from softshard.finetune.adapters.kinds import load_adapter, save_adapter
from softshard.finetune.card import renew_card
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import FineTuned, Step, fine_tune
from softshard.finetune.record import SweptTraining, Trained, TrainingReceipt, find_training, write_trained
from softshard.finetune.retention import Retention
from softshard.models import check_context, check_tokenizer, check_vocabulary, load_model, output_size, resolve_device
from softshard.output.workspace import Workspace
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.manifest import Manifest, SourceRights
from softshard.shard.read import read_rows
from softshard.stages.train.author_cap import check_author_cap
from softshard.stages.train.card import make_card
from softshard.stages.train.data import TrainingData, open_training_data
from softshard.stages.train.trainings import TrainingSpec, training_specs
from softshard.teacher.style import training_precision
from softshard.telemetry import Reporter

__all__ = ["ensure_trained", "set_training_threads"]


def ensure_trained(
    workspace: Workspace, manifest: Manifest, retention: CorpusManifest | None, reporter: Reporter, *, compute: bool
) -> Trained:
    """The adapter and the baseline of the job, trained where they are missing; of a sweep, the best.

    Raises:
        AuthorDominates: one author's writing is more of what would be trained on than the job allows.
        TokenizerMismatch: the student's tokenizer is not the one that the targets were made with.
        VocabularyMismatch: the student has no logit for some token of the targets.
    """
    _check_student(workspace, manifest)
    store = workspace.adapter
    feed = open_training_data(workspace, manifest)
    grid, baselines = training_specs(workspace, feed, retention)
    plans: dict[str, TrainingSpec] = {}
    for plan in (*grid, *baselines):
        plans.setdefault(plan.training_id, plan)
    found = {key: _find(workspace, plan) for key, plan in plans.items()}
    if not compute and None in found.values():
        raise AdapterMissing(uri=store.uri)
    authors = check_author_cap(workspace, feed, retention)
    receipts = {}
    for key, plan in plans.items():
        receipt = found[key]

        def describe(one: TrainingReceipt, plan: TrainingSpec = plan) -> None:
            rights = _rights(retention, plan)
            num_compared = len(grid if plan in grid else baselines)
            card = make_card(workspace, (feed, authors), one, rights, num_compared=num_compared)
            renew_card(store, one.folder, card)

        if receipt is None:
            receipt = _train(workspace, manifest, feed, retention, plan, describe, reporter)
        elif compute:
            describe(receipt)
        receipts[key] = receipt
    swept, candidates = (tuple(receipts[plan.training_id] for plan in some) for some in (grid, baselines))
    sweep = tuple(
        SweptTraining(training=one, retention_nll_nats=_retention_cost(workspace, manifest, retention, one))
        for one in swept
        if workspace.job.train.sweep is not None
    )
    best = min(candidates, key=lambda one: (one.holdout_nll_nats or 0.0, one.learning_rate)) if candidates else None
    chosen = min(swept, key=lambda one: one.holdout_nll_nats or 0.0)
    trained = Trained(adapter=chosen, baseline=best, candidates=candidates, sweep=sweep)
    write_trained(store, trained)
    return trained


def _check_student(workspace: Workspace, manifest: Manifest) -> None:
    student, data = workspace.student_model, workspace.targets.uri
    check_tokenizer(student.tokenizer, model=student.name, data=data, data_fingerprint=manifest.tokenizer_fingerprint)
    check_context(student.folder, context_tokens=workspace.job.corpus.context_tokens)
    size = output_size(student.folder)
    check_vocabulary(model=student.name, model_size=size, data=data, data_size=manifest.vocab_size)


def _find(workspace: Workspace, plan: TrainingSpec) -> TrainingReceipt | None:
    """The receipt of a training that is complete, whatever it was for then. Raises PartCorrupt."""
    receipts = (find_training(workspace.adapter, folder) for folder in plan.folders)
    return next((receipt for receipt in receipts if receipt is not None), None)


def _rights(retention: CorpusManifest | None, plan: TrainingSpec) -> tuple[SourceRights, ...]:
    """Of the retention text that a training takes."""
    return () if retention is None or plan.retention is None else retention.sources


def _train(
    workspace: Workspace,
    manifest: Manifest,
    feed: TrainingData,
    retention: CorpusManifest | None,
    plan: TrainingSpec,
    describe: Callable[[TrainingReceipt], None],
    reporter: Reporter,
) -> TrainingReceipt:
    """Run a training; `describe` writes its card, before the receipt makes it complete."""
    import torch

    settings, student, store = workspace.job.train, workspace.student_model, workspace.adapter
    set_training_threads(settings)
    dtype, _ = training_precision(settings.dtype, device=settings.device)
    checkpoint = Checkpoint(store=store, path=f".checkpoints/{plan.folder}.pt")
    stream = feed.dataset(workspace, alpha=plan.alpha, optimizer=plan.optimizer)
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
    sources = (*feed.sources, *_rights(retention, plan))
    receipt = _receipt(workspace, feed, sources, plan, tuned, holdout_nll)
    describe(receipt)
    store.put_once(f"{plan.folder}/receipt.json", canonical_json(receipt))
    checkpoint.remove()
    return receipt


def _retention_cost(
    workspace: Workspace, manifest: Manifest, retention: CorpusManifest | None, receipt: TrainingReceipt
) -> float | None:
    """Mean NLL of an adapter on the held-out retention text, in nats; None where the job has no such text.

    It is kept beside the adapter, by the digest of the text, and not measured again.
    """
    if retention is None:
        return None
    import torch

    store, path = workspace.adapter, f"{receipt.folder}/retention-{retention.digest[:16]}.json"
    if store.exists(path):
        return float(json.loads(store.read(path))["retention_nll_nats"])
    settings = workspace.job.train
    dtype, _ = training_precision(settings.dtype, device=settings.device)
    device = resolve_device(settings.device)
    model = load_model(workspace.student_model.folder, dtype=getattr(torch, dtype), device=device)
    folder = store.local_folder(receipt.folder, receipt.files)
    nll = retention_nll(
        load_adapter(model, folder, device=device),
        iter_sequences(workspace.retention, retention, split="test"),
        num_valid=manifest.vocab_size,
        batch_tokens=workspace.job.evaluate.batch_tokens,
        on_progress=lambda done: None,
    )
    if nll is not None:
        store.put_once(path, (json.dumps({"retention_nll_nats": nll}) + "\n").encode())
    return nll


def set_training_threads(settings: TrainSettings) -> None:
    """Give torch the job's number of CPU threads, or all cores."""
    import os

    import torch

    torch.set_num_threads(settings.num_threads or len(os.sched_getaffinity(0)))


def _retention(workspace: Workspace, retention: CorpusManifest | None, plan: TrainingSpec) -> Retention | None:
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


def _receipt(
    workspace: Workspace,
    feed: TrainingData,
    sources: tuple[SourceRights, ...],
    plan: TrainingSpec,
    tuned: FineTuned,
    holdout_nll: float | None,
) -> TrainingReceipt:
    """Of a training whose files are written here."""
    return TrainingReceipt(
        training_id=plan.training_id,
        folder=plan.folder,
        files=_save(workspace, plan, tuned),
        manifests=tuple(one.targets.manifest.digest for one in feed.sets),
        sources=sources,
        settings=workspace.job.train.model_dump(mode="json"),
        objective="ce" if plan.alpha == 1 else "kl",
        alpha=plan.alpha,
        learning_rate=plan.optimizer.learning_rate,
        retention_weight=plan.retention_weight,
        num_steps=len(tuned.log),
        num_tokens=sum(step.tokens for step in tuned.log),
        holdout_nll_nats=holdout_nll,
    )


def _save(workspace: Workspace, plan: TrainingSpec, tuned: FineTuned) -> dict[str, str]:
    """Write the adapter and its log; name and SHA-256 of each of the adapter's files."""
    store = workspace.adapter
    files = save_adapter(tuned.model, base_model=workspace.student_model.name)
    for name, content in files.items():
        store.put_once(f"{plan.folder}/{name}", content)
    log = "".join(json.dumps(asdict(step)) + "\n" for step in tuned.log)
    store.replace(f"{plan.folder}/log.jsonl", log.encode())
    return {name: sha256_hex(content) for name, content in files.items()}
