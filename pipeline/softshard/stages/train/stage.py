"""The train stage: the adapter, trained on the stored targets, and the baseline, trained on the same tokens.

The id of a training is a digest of everything that it depends on; a complete training is never repeated, whatever job
settings it was made for. Its card is rewritten whenever the stage runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from softshard.config import TrainSettings
from softshard.data.groups import Tally
from softshard.data.text import TextBatches
from softshard.errors import AdapterMissing
from softshard.finetune.adapters.kinds import save_adapter
from softshard.finetune.card import renew_card
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import FineTuned, Step, fine_tune
from softshard.finetune.record import SweptTraining, Trained, TrainingReceipt, find_training, write_trained
from softshard.finetune.retention import Retention
from softshard.output.workspace import Workspace
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.manifest import Manifest, SourceRights
from softshard.stages.corpus.stage import StoredCorpus
from softshard.stages.holdout import Holdout, make_holdout
from softshard.stages.train.author_cap import check_author_cap
from softshard.stages.train.card import make_card
from softshard.stages.train.data import TrainingData, open_training_data
from softshard.stages.train.student import Student, check_student, make_student
from softshard.stages.train.trainings import TrainingSpec, training_specs
from softshard.storage import Store
from softshard.telemetry import Reporter

__all__ = ["ensure_trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What all trainings of a job share."""

    job: str
    """Name of the job."""
    settings: TrainSettings
    seed: int
    data: TrainingData
    author_shares: Tally
    student: Student
    holdout: Holdout
    retention: StoredCorpus | None
    store: Store
    """The `adapter/` folder."""
    reporter: Reporter

    def retention_sources(self, spec: TrainingSpec) -> tuple[SourceRights, ...]:
        """Sources of the retention text that a training uses."""
        return () if self.retention is None or spec.retention is None else self.retention.manifest.sources


def ensure_trained(
    workspace: Workspace, manifest: Manifest, retention: StoredCorpus | None, reporter: Reporter, *, compute: bool
) -> Trained:
    """The adapter and the baseline of the job, trained where they are missing; of a sweep, the best.

    Raises:
        AdapterMissing: a training is missing and `compute` is false.
        AuthorDominates: one author's writing is a larger share of the training data than the job allows.
        TokenizerMismatch: the student's tokenizer is not the one that the targets were made with.
        VocabularyMismatch: the student has no logit for some token of the targets.
    """
    job, store = workspace.job, workspace.adapter
    fingerprint, vocab_size = manifest.tokenizer_fingerprint, manifest.vocab_size
    check_student(workspace, data=workspace.targets.uri, fingerprint=fingerprint, vocab_size=vocab_size)
    _report_end(workspace, reporter)
    data, student = open_training_data(workspace, manifest), make_student(workspace)
    retention_digest = None if retention is None else retention.manifest.digest
    grid, baselines = training_specs(job.train, data, student, retention_digest=retention_digest, seed=job.seed)
    specs: dict[str, TrainingSpec] = {}
    for spec in (*grid, *baselines):
        specs.setdefault(spec.training_id, spec)
    found = {training_id: _find(store, spec) for training_id, spec in specs.items()}
    if not compute and None in found.values():
        raise AdapterMissing(uri=store.uri)
    shared = _Shared(
        job=job.name,
        settings=job.train,
        seed=job.seed,
        data=data,
        author_shares=check_author_cap(workspace, data, retention),
        student=student,
        holdout=make_holdout(workspace, manifest, retention),
        retention=retention,
        store=store,
        reporter=reporter,
    )
    receipts = {}
    for training_id, spec in specs.items():
        num_compared, receipt = len(grid if spec in grid else baselines), found[training_id]
        if receipt is None:
            receipt = _train(shared, spec, num_compared=num_compared)
        elif compute:
            _write_card(shared, spec, receipt, num_compared=num_compared)
        receipts[training_id] = receipt
    trained = _choose(
        shared,
        [receipts[spec.training_id] for spec in grid],
        [receipts[spec.training_id] for spec in baselines],
    )
    write_trained(store, trained)
    return trained


def _report_end(workspace: Workspace, reporter: Reporter) -> None:
    """Say so where the student's own tokenizer ends a text with another token than the documents end with."""
    teacher, student = workspace.teacher_model.tokenizer, workspace.student_model.tokenizer
    if teacher.eos_id != student.eos_id:
        reporter.say(
            f"train: documents end with {teacher.token(teacher.eos_id)!r}, which the student learns, though its own"
            f" tokenizer ends a text with {student.token(student.eos_id)!r}"
        )


def _find(store: Store, spec: TrainingSpec) -> TrainingReceipt | None:
    """The receipt of a training that is complete, under any of its names. Raises PartCorrupt."""
    receipts = (find_training(store, folder) for folder in spec.folders)
    return next((receipt for receipt in receipts if receipt is not None), None)


def _choose(shared: _Shared, grid: list[TrainingReceipt], baselines: list[TrainingReceipt]) -> Trained:
    """The trainings of the grid and of the baseline with the lowest NLL on the hold-out."""
    sweep = tuple(
        SweptTraining(training=receipt, retention_nll_nats=_retention_nll(shared, receipt))
        for receipt in (grid if shared.settings.sweep is not None else ())
    )
    return Trained(
        adapter=min(grid, key=lambda receipt: receipt.holdout_nll_nats or 0.0),
        baseline=min(
            baselines, key=lambda receipt: (receipt.holdout_nll_nats or 0.0, receipt.learning_rate), default=None
        ),
        candidates=tuple(baselines),
        sweep=sweep,
    )


def _retention_nll(shared: _Shared, receipt: TrainingReceipt) -> float | None:
    """Mean NLL of an adapter on the held-out retention text, in nats per token; None where the job has no such text.

    It is stored beside the adapter under the digest of the text, and not measured again.
    """
    if shared.retention is None:
        return None
    store, digest = shared.store, shared.retention.manifest.digest
    path = f"{receipt.folder}/retention-{digest[:16]}.json"
    if store.exists(path):
        return float(json.loads(store.read(path))["retention_nll_nats"])
    model = shared.student.load(store.local_folder(receipt.folder, receipt.files))
    nll = shared.holdout.retention_nll(model)
    if nll is not None:
        store.put_once(path, (json.dumps({"retention_nll_nats": nll}) + "\n").encode())
    return nll


def _train(shared: _Shared, spec: TrainingSpec, *, num_compared: int) -> TrainingReceipt:
    """Run a training and store its adapter, log, card and, last, its receipt, which makes it complete."""
    settings, store = shared.settings, shared.store
    checkpoint = Checkpoint(store=store, path=f".checkpoints/{spec.folder}.pt")
    with shared.reporter.progress(f"train {spec.label}", total=None, unit="steps") as progress:

        def on_step(step: Step) -> None:
            kept = "" if step.retention_loss is None else f", retention {step.retention_loss:.3f}"
            progress(step.step, total=step.total_steps, note=f"loss {step.loss:.3f}{kept}")

        tuned = fine_tune(
            shared.student.load(),
            shared.data.dataset(settings, alpha=spec.alpha, optimizer=spec.optimizer, seed=shared.seed),
            lora=settings.lora,
            adapter=settings.adapter,
            objective=spec.objective,
            optimizer=spec.optimizer,
            retention=_retention(shared, spec),
            seed=shared.seed,
            num_valid=shared.holdout.manifest.vocab_size,
            chunk_positions=settings.chunk_positions,
            checkpoint=checkpoint,
            identity=spec.training_id,
            on_step=on_step,
        )
        progress(len(tuned.log), total=len(tuned.log), note="scoring the hold-out")
        holdout_nll = shared.holdout.score(tuned.model).human_nll_nats if shared.holdout.num_labels else None
    receipt = _store_training(shared, spec, tuned, holdout_nll=holdout_nll)
    _write_card(shared, spec, receipt, num_compared=num_compared)
    store.put_once(f"{spec.folder}/receipt.json", canonical_json(receipt))
    checkpoint.remove()
    return receipt


def _retention(shared: _Shared, spec: TrainingSpec) -> Retention | None:
    if shared.retention is None or spec.retention is None:
        return None
    batches = TextBatches(
        list(shared.retention.sequences("train")),
        seed=shared.seed,
        batch_tokens=spec.retention.batch_tokens,
        name="retention",
    )
    return Retention(batches=batches, weight=spec.retention_weight, objective=spec.retention.objective)


def _store_training(
    shared: _Shared, spec: TrainingSpec, tuned: FineTuned, *, holdout_nll: float | None
) -> TrainingReceipt:
    """Store the adapter and its log; returns the receipt, which is not stored yet."""
    files = save_adapter(tuned.model, base_model=shared.student.model.location)
    for name, content in files.items():
        shared.store.put_once(f"{spec.folder}/{name}", content)
    log = "".join(json.dumps(asdict(step)) + "\n" for step in tuned.log)
    shared.store.replace(f"{spec.folder}/log.jsonl", log.encode())
    return TrainingReceipt(
        training_id=spec.training_id,
        folder=spec.folder,
        files={name: sha256_hex(content) for name, content in files.items()},
        manifests=tuple(target_set.targets.manifest.digest for target_set in shared.data.sets),
        sources=(*shared.data.sources, *shared.retention_sources(spec)),
        settings=shared.settings.model_dump(mode="json"),
        objective="ce" if spec.alpha == 1 else "kl",
        alpha=spec.alpha,
        learning_rate=spec.optimizer.learning_rate,
        retention_weight=spec.retention_weight,
        num_steps=len(tuned.log),
        num_tokens=sum(step.tokens for step in tuned.log),
        holdout_nll_nats=holdout_nll,
    )


def _write_card(shared: _Shared, spec: TrainingSpec, receipt: TrainingReceipt, *, num_compared: int) -> None:
    card = make_card(
        receipt,
        shared.data,
        shared.settings,
        job=shared.job,
        base_model=shared.student.model,
        author_shares=shared.author_shares,
        retention_sources=shared.retention_sources(spec),
        num_compared=num_compared,
    )
    renew_card(shared.store, receipt.folder, card)
