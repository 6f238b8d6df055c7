"""The plan of a job: documents, tokens, parts, bytes, hours and cost, before anything runs.

The corpus is read and counted in full, and nothing is written. Speed and bytes per position are measured on the first
sequences of the corpus with the teacher's model as it is, or given; a pilot measures what other targets would cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from softshard.config import Job
from softshard.corpus.build import count_corpus, first_sequences
from softshard.models import Tokenizer, check_device, peak_memory, resolve_model, weights_digest
from softshard.output.workspace import Workspace
from softshard.pilot.measure import (
    NUM_SEQUENCES,
    Extent,
    Measured,
    Pilot,
    chosen_by,
    measure,
    run_pilot,
    spread,
)
from softshard.shard.commit import PartSpec
from softshard.sketch.types import TokenSequence
from softshard.stages import STAGES
from softshard.stages.estimate import (
    PASSES_OF_A_TRAINING_STEP,
    StudentEstimate,
    WeightBytes,
    estimate_student,
    weigh_corpus,
    weight_bytes,
)
from softshard.stages.models import check_models
from softshard.stages.train.author_cap import CountedAuthors, count_authors
from softshard.stages.train.trainings import count_trainings
from softshard.storage import open_store
from softshard.teacher.engines import open_teacher, teacher_identity
from softshard.teacher.protocol import Teacher
from softshard.telemetry import Reporter, SilentReporter

__all__ = ["Plan", "make_plan"]

_SPREAD_FACTOR = 16
"""A pilot's sequences are spread over this many times their number, from the start of the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job would do."""

    job: str
    out: str
    documents: int
    left_out: dict[str, int]
    not_read: dict[str, str]
    """By source: the files that are not read, in one line; without those of which every file is read."""
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
    """Teacher hours for the targets, summed over all workers."""
    training_hours: float
    """Teacher hours for training the style teacher; a trained token counts as three scored tokens."""
    wall_hours: float
    """Hours for style teacher and targets on the job's workers, without the student's trainings."""
    cost: float | None
    """Of the teacher hours."""
    num_trainings: int
    """Trainings of the student, and of the baseline at each learning rate."""
    trained_tokens: int
    """Tokens of all trainings, without retention text."""
    adapted_teacher: bool
    """Whether the run will train a style teacher, which could not be measured."""
    target: str
    """The target; where the job has a budget, the one that a pilot with the model as it is chooses."""
    budget: str | None
    """The job's `budget_bytes` or `max_angle_degrees`; None without a budget."""
    pilot: Pilot | None
    """The measurements of a pilot; None where none was made."""
    authors: CountedAuthors | None
    """Shares of the authors in the training data; None where unknown before there are targets."""
    holdout_documents: int
    holdout_tokens: int
    student: StudentEstimate
    """Steps and hours of the student's trainings and of the report."""
    weight_bytes: WeightBytes
    """Memory that the weights alone need."""
    peak_bytes: int | None
    """Most memory of a CUDA device while the teacher's speed was measured; None where it was not counted."""
    warnings: list[str]
    """What makes the run of little use, though it can be done."""


def make_plan(
    job: Job,
    reporter: Reporter,
    *,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    num_pilot: int | None = None,
) -> Plan:
    """Count the corpus, and measure what the arguments do not give.

    Args:
        job: the job.
        reporter: where progress goes.
        tokens_per_second: speed of one worker; None: measured.
        price_per_hour: price of one worker for one hour; None: no cost.
        num_pilot: number of sequences of a pilot; None: no pilot, unless the target has a budget.

    Raises:
        JobInvalid: the target has a budget that no tau keeps.
        SoftshardError: a model, a device or an engine cannot be used; see `check_models`.
    """
    workspace = Workspace(job=job, out=open_store(job.out))
    warnings = check_models(workspace, STAGES)
    # The teacher is measured here, wherever the workers of the run are.
    check_device(job.teacher.device, setting="teacher.device")
    tokenizer = workspace.teacher_model.tokenizer
    count = count_corpus(
        settings=job.corpus, tokenizer=tokenizer, folds=job.teacher.folds, seed=job.seed, reporter=reporter
    )
    authors = count_authors(job, tokenizer, count.groups, reporter)
    train, test, everything = count.total("train"), count.total("test"), count.total()
    extent = Extent(num_parts=everything["num_slices"], num_labels=everything["num_labels"])
    found = _measure(job, tokenizer, reporter, extent=extent, num_pilot=num_pilot)
    speed = tokens_per_second if tokens_per_second is not None else found.tokens_per_second
    hours = _teacher_hours(job, train_tokens=train["num_tokens"], test_tokens=test["num_tokens"], speed=speed)
    trainings = count_trainings(job.train)
    return Plan(
        job=job.name,
        out=job.out,
        documents=everything["num_documents"],
        left_out={name: number for name, number in count.counts.items() if name != "kept" and number},
        not_read={entry.source: entry.text for entry in count.not_read},
        tokens=everything["num_tokens"],
        sequences=everything["num_sequences"],
        positions=everything["num_labels"],
        parts=everything["num_slices"],
        bytes_per_position=found.target.bytes_per_position,
        bytes=found.target.num_bytes,
        tokens_per_second=speed,
        speed_is="measured" if tokens_per_second is None else "given",
        workers=job.cluster.most_workers,
        scoring_hours=hours.scoring,
        training_hours=hours.training,
        wall_hours=hours.wall,
        cost=None if price_per_hour is None else (hours.scoring + hours.training) * price_per_hour,
        num_trainings=trainings,
        trained_tokens=round(train["num_tokens"] * job.train.optimizer.epochs * trainings),
        adapted_teacher=job.teacher.folds > 0,
        target=f"{job.target.kind} {found.target.sketch.setting}",
        budget=job.target.budget,
        pilot=found.pilot,
        authors=authors,
        holdout_documents=test["num_documents"],
        holdout_tokens=test["num_tokens"],
        student=estimate_student(
            job, train_tokens=train["num_tokens"], test_tokens=test["num_tokens"], tokens_per_second=speed
        ),
        weight_bytes=weight_bytes(workspace),
        peak_bytes=found.peak_bytes,
        warnings=[
            *warnings,
            *weigh_corpus(job, train_tokens=train["num_tokens"], test_documents=test["num_documents"]),
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hours:
    """Hours of the teacher, summed over all workers, and wall-clock."""

    scoring: float
    training: float
    wall: float


def _teacher_hours(job: Job, *, train_tokens: int, test_tokens: int, speed: float) -> _Hours:
    folds, workers = job.teacher.folds, job.cluster.most_workers
    scored = train_tokens + test_tokens * max(1, folds)
    trained = train_tokens * max(0, folds - 1) * job.teacher.optimizer.epochs
    scoring = scored / speed / 3600
    training = trained * PASSES_OF_A_TRAINING_STEP / speed / 3600
    wall = scoring / workers + (training / min(workers, folds) if folds else 0.0)
    return _Hours(scoring=scoring, training=training, wall=wall)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measurements:
    """Speed and size of the job's target."""

    tokens_per_second: float
    target: Measured
    pilot: Pilot | None
    peak_bytes: int | None


def _measure(
    job: Job, tokenizer: Tokenizer, reporter: Reporter, *, extent: Extent, num_pilot: int | None
) -> _Measurements:
    engine, part = _open_engine(job, tokenizer)
    pilot: Pilot | None = None
    if num_pilot is not None or job.target.budget is not None:
        num = NUM_SEQUENCES if num_pilot is None else num_pilot
        reporter.say(f"pilot: scoring {num} sequences with the teacher's model")
        candidates = _first_sequences(job, tokenizer, num_tokens=_SPREAD_FACTOR * num * job.corpus.context_tokens)
        pilot = run_pilot(engine, spread(candidates, num=num), spec=part, extent=extent, reporter=reporter)
        part = replace(part, sketch=chosen_by(pilot, target=job.target, job=job.name))
    reporter.say("measuring the teacher's speed on the first sequences of the corpus")
    sequences = _first_sequences(job, tokenizer, num_tokens=2 * job.teacher.batch_tokens)
    engine.score(sequences[:1], sketch=part.sketch, seed=part.seed)
    started = time.perf_counter()
    engine.score(sequences, sketch=part.sketch, seed=part.seed)
    seconds = time.perf_counter() - started
    if pilot is None:
        rows = measure(engine, sequences, sketches=(part.sketch,), spec=part, extent=extent, reporter=SilentReporter())
    else:
        rows = [row for row in pilot.rows if row.sketch == part.sketch]
    (target,) = rows
    peak = peak_memory(job.teacher.device)
    engine.close()
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return _Measurements(tokens_per_second=num_tokens / seconds, target=target, pilot=pilot, peak_bytes=peak)


def _first_sequences(job: Job, tokenizer: Tokenizer, *, num_tokens: int) -> list[TokenSequence]:
    return first_sequences(settings=job.corpus, tokenizer=tokenizer, seed=job.seed, num_tokens=num_tokens)


def _open_engine(job: Job, tokenizer: Tokenizer) -> tuple[Teacher, PartSpec]:
    """The teacher's model as it is, and the spec of a part that it would score."""
    folder = resolve_model(job.teacher.model, revision=job.teacher.revision)
    identity = teacher_identity(
        job.teacher, context_tokens=job.corpus.context_tokens, weights=weights_digest(folder), adapters=()
    )
    part = PartSpec(
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
    engine = open_teacher(
        folder, adapters=(), identity=identity, device=job.teacher.device, vocab_size=tokenizer.vocab_size
    )
    return engine, part
