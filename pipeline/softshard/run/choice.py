"""The tau of a run whose target has a budget: found once, by a pilot on the cluster, and kept.

In: a run as the job has it. Out: the sketch settings of its parts, with a tau. The pilot's table is kept in
`targets/pilot/`, created exclusively under a digest of corpus, teacher, target and seed, so that every later run, and
one that runs at the same time, goes by the same tau. A pilot that is stopped leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from softshard.config import SketchSettings, ThresholdSketch, digest_of
from softshard.corpus.manifest import CorpusManifest, CorpusSlice
from softshard.corpus.read import read_slice
from softshard.errors import ManifestMissing, PartCorrupt, PartsFailed
from softshard.run.cluster import Cluster
from softshard.run.pilot import NUM_SEQUENCES, Extent, Pilot, chosen_by, run_pilot, setting_of, spread
from softshard.run.tasks import ScoreRun, load_teacher
from softshard.shard.commit import PartPlan
from softshard.shard.manifest import canonical_json
from softshard.storage import Store, open_store
from softshard.target.types import TokenSequence
from softshard.telemetry import Reporter, SilentReporter

__all__ = ["PilotTask", "ensure_resolved", "score_pilot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotTask:
    """A pilot to run on a worker."""

    run: ScoreRun
    plan: PartPlan
    """A part of the run, whose teacher is measured."""
    sequences: tuple[TokenSequence, ...]
    extent: Extent


def score_pilot(task: PilotTask) -> Pilot:
    """Run a pilot on a worker, which keeps the engine for the parts that follow."""
    teacher = load_teacher(task.run, fold=task.plan.fold)
    return run_pilot(teacher, task.sequences, plan=task.plan, extent=task.extent, reporter=SilentReporter())


def ensure_resolved(
    run: ScoreRun,
    corpus: CorpusManifest,
    reporter: Reporter,
    cluster: Callable[[], Cluster],
    *,
    job: str,
    compute: bool,
) -> SketchSettings:
    """The sketch of a run's parts with a tau: as the job gives it, or as the pilot found, which runs where it has not.

    Args:
        run: with the job's own sketch settings.
        corpus: where the sequences are.
        reporter: where progress goes.
        cluster: opens the cluster.
        job: name of the job, for the error.
        compute: run what is missing.

    Raises:
        ManifestMissing: the pilot has not run, and must not.
        JobInvalid: no tau keeps the budget.
        PartsFailed: the pilot was set aside.
    """
    target, store = run.sketch, open_store(run.targets)
    if not isinstance(target, ThresholdSketch) or target.is_resolved:
        return target
    plan = next(run.plan(index, part) for index, part in enumerate(corpus.slices) if part.split == "train")
    path = _path(plan, corpus)
    pilot = _read(store, path)
    if pilot is None:
        if not compute:
            raise ManifestMissing(uri=f"{store.uri}/{path}", stage="targets")
        reporter.say("pilot: a few sequences, to find the tau that the target asks for")
        store.create_exclusive(path, canonical_json(_run_on(cluster(), run, plan, corpus)))
        pilot = _read(store, path)
        assert pilot is not None
    sketch = chosen_by(pilot, target=target, job=job)
    (row,) = (row for row in pilot.rows if row.sketch == sketch)
    reporter.say(
        f"pilot: tau {setting_of(sketch)}, {row.bytes_per_position:.1f} bytes a position,"
        f" gradient angle {row.gradient_angle_degrees:.1f} degrees on {pilot.num_sequences} sequences"
    )
    return sketch


def _path(plan: PartPlan, corpus: CorpusManifest) -> str:
    return f"pilot/{digest_of([corpus.digest, plan.teacher, plan.sketch, plan.seed, NUM_SEQUENCES])[:32]}.json"


def _read(store: Store, path: str) -> Pilot | None:
    try:
        return Pilot.model_validate_json(store.read(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=f"is not a pilot: {error.errors()[0]['msg']}") from error


def _run_on(cluster: Cluster, run: ScoreRun, plan: PartPlan, corpus: CorpusManifest) -> Pilot:
    slices = [part for part in corpus.slices if (part.split, part.fold) == (plan.split, plan.fold)]
    pilot = PilotTask(
        run=run,
        plan=plan,
        sequences=tuple(_spread_over(open_store(run.corpus), slices)),
        extent=Extent(
            num_parts=len(corpus.slices),
            num_labels=sum(part.num_labels for part in corpus.slices),
        ),
    )
    done: list[Pilot] = []
    failures = cluster.run(
        score_pilot, [pilot], name=lambda _: "pilot", on_result=lambda _, measured, __: done.append(measured)
    )
    if failures:
        raise PartsFailed(failures=failures, out=run.targets)
    return done[0]


def _spread_over(store: Store, slices: Sequence[CorpusSlice]) -> list[TokenSequence]:
    """Sequences of a pilot, at equal distances; only slices that hold one are read."""
    wanted = spread(range(sum(part.num_sequences for part in slices)), num=NUM_SEQUENCES)
    found: list[TokenSequence] = []
    first = 0
    for part in slices:
        inside = [place - first for place in wanted if first <= place < first + part.num_sequences]
        if inside:
            sequences = read_slice(store, part)
            found += [sequences[place] for place in inside]
        first += part.num_sequences
    return found
