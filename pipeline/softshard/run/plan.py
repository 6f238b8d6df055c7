"""What a job would do, before it does it: documents, tokens, parts, bytes, hours and cost.

The corpus is read and counted in full, nothing is written. Speed and bytes a position are measured on the first
sequences of the corpus with the teacher's model as it is, or given.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from softshard.config import Job
from softshard.corpus.build import count_corpus, first_sequences
from softshard.models import Tokenizer, check_context, load_tokenizer, resolve_model, weights_digest
from softshard.shard.commit import PartPlan, build_part
from softshard.teacher.transformers_engine import TransformersTeacher, engine_identity
from softshard.telemetry import Reporter

__all__ = ["Plan", "make_plan", "render_plan"]

_PASSES_OF_A_TRAINING_STEP = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of a few sequences."""

    tokens_per_second: float
    bytes_per_position: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job would do."""

    job: str
    out: str
    documents: int
    left_out: dict[str, int]
    tokens: int
    sequences: int
    positions: int
    parts: int
    bytes_per_position: float
    bytes: int
    tokens_per_second: float
    """Of one worker."""
    speed_is: str
    """`measured` or `given`."""
    workers: int
    scoring_hours: float
    """Teacher hours of the targets, over all workers."""
    training_hours: float
    """Teacher hours of the style teacher; a token trained is counted as three tokens scored."""
    wall_hours: float
    """Style teacher and targets on the job's workers; the student's trainings come on top."""
    cost: float | None
    """Of the teacher hours."""
    num_trainings: int
    """The student's, and the baseline's at each learning rate."""
    trained_tokens: int
    """Tokens of all of them, retention text left out."""


def make_plan(job: Job, reporter: Reporter, *, tokens_per_second: float | None, price_per_hour: float | None) -> Plan:
    """Count the corpus, and measure what is not given.

    Args:
        job: the job.
        reporter: where progress goes.
        tokens_per_second: speed of one worker; None: it is measured.
        price_per_hour: price of one worker's hour; None: no cost is given.
    """
    folder = resolve_model(job.teacher.model, revision=job.teacher.revision)
    check_context(folder, context_tokens=job.corpus.context_tokens)
    tokenizer = load_tokenizer(folder)
    count = count_corpus(
        settings=job.corpus, tokenizer=tokenizer, folds=job.teacher.folds, seed=job.seed, reporter=reporter
    )
    reporter.say("measuring the teacher on the first sequences of the corpus")
    measured = _measure(job, tokenizer)
    speed = tokens_per_second if tokens_per_second is not None else measured.tokens_per_second
    folds, workers = job.teacher.folds, job.cluster.workers
    train, test, everything = count.total("train"), count.total("test"), count.total()
    scored = train["num_tokens"] + test["num_tokens"] * max(1, folds)
    trained = train["num_tokens"] * max(0, folds - 1) * job.teacher.optimizer.epochs
    scoring = scored / speed / 3600
    training = trained * _PASSES_OF_A_TRAINING_STEP / speed / 3600
    trainings = 1 + (0 if job.train.baseline is None else len(job.train.baseline.learning_rates))
    wall = scoring / workers + (training / min(workers, folds) if folds else 0.0)
    return Plan(
        job=job.name,
        out=job.out,
        documents=everything["num_documents"],
        left_out={name: number for name, number in count.counts.items() if name != "kept" and number},
        tokens=everything["num_tokens"],
        sequences=everything["num_sequences"],
        positions=everything["num_labels"],
        parts=everything["num_slices"],
        bytes_per_position=measured.bytes_per_position,
        bytes=round(everything["num_labels"] * measured.bytes_per_position),
        tokens_per_second=speed,
        speed_is="measured" if tokens_per_second is None else "given",
        workers=workers,
        scoring_hours=scoring,
        training_hours=training,
        wall_hours=wall,
        cost=None if price_per_hour is None else (scoring + training) * price_per_hour,
        num_trainings=trainings,
        trained_tokens=round(train["num_tokens"] * job.train.optimizer.epochs * trainings),
    )


def _measure(job: Job, tokenizer: Tokenizer) -> Measured:
    teacher = job.teacher
    folder = resolve_model(teacher.model, revision=teacher.revision)
    sequences = first_sequences(
        settings=job.corpus, tokenizer=tokenizer, seed=job.seed, num_tokens=2 * teacher.batch_tokens
    )
    identity = engine_identity(teacher, weights=weights_digest(folder), adapters=())
    engine = TransformersTeacher(
        folder, adapters=(), identity=identity, device=teacher.device, vocab_size=tokenizer.vocab_size
    )
    engine.score(sequences[:1], sketch=job.target, seed=job.seed)
    started = time.perf_counter()
    targets, fidelity = engine.score(sequences, sketch=job.target, seed=job.seed)
    seconds = time.perf_counter() - started
    plan = PartPlan(
        index=0,
        split="train",
        fold=-1,
        slice="",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        teacher=identity,
        sketch=job.target,
        seed=job.seed,
    )
    content, _ = build_part(plan, list(zip(sequences, targets, strict=True)), fidelity)
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return Measured(
        tokens_per_second=num_tokens / seconds,
        bytes_per_position=len(content) / fidelity.num_labels,
    )


def render_plan(plan: Plan) -> str:
    """The plan as lines of at most 80 columns."""
    left_out = ", ".join(f"{number:,} {name}" for name, number in plan.left_out.items())
    rows = [
        ("documents", f"{plan.documents:,}" + (f" (left out: {left_out})" if left_out else "")),
        ("tokens", f"{plan.tokens:,} in {plan.sequences:,} sequences"),
        ("positions", f"{plan.positions:,}"),
        ("parts", f"{plan.parts:,}"),
        ("bytes", f"about {plan.bytes:,} at {plan.bytes_per_position:.1f} a position"),
        ("speed", f"{plan.tokens_per_second:,.0f} tokens a second and worker, {plan.speed_is}"),
        ("style teacher", f"{plan.training_hours:.3g} hours"),
        ("targets", f"{plan.scoring_hours:.3g} hours"),
        ("teacher in all", f"{plan.wall_hours:.3g} hours with {plan.workers} worker(s)"),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.2f}"))
    rows.append(("then", f"{plan.num_trainings} training(s) of the student, {plan.trained_tokens:,} tokens in all"))
    return "\n".join([f"{plan.out}: job {plan.job}", "", *(f"{name:<15} {value}" for name, value in rows)]) + "\n"
