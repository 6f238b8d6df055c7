"""The tau of a run whose target has a budget: found once, by a pilot on the cluster, and kept.

In: a run as the job has it. Out: the sketch settings of its parts, with a tau. The pilot's table is kept in
`targets/pilot/`, created exclusively under a digest of teacher, target, seed and sources and one of the corpus, so that
every later run, and one that runs at the same time, goes by the same tau. A corpus that has changed keeps the tau of a
pilot before it while that keeps the budget, so that its parts keep their names. A pilot that is stopped leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from softshard.cluster.cluster import Cluster
from softshard.config import SketchSettings, ThresholdSketch
from softshard.corpus.manifest import CorpusManifest, CorpusSlice
from softshard.corpus.read import read_slice
from softshard.errors import ManifestMissing, PartCorrupt, PartsFailed
from softshard.pilot.measure import NUM_SEQUENCES, Extent, Measured, Pilot, chosen_by, run_pilot, spread
from softshard.records.canonical import canonical_json
from softshard.records.digest import canonical_digest
from softshard.shard.commit import PartSpec
from softshard.sketch.types import TokenSequence
from softshard.stages.targets.tasks import ScoringSpec, load_teacher
from softshard.storage import Store, open_store
from softshard.telemetry import Reporter, SilentReporter

__all__ = ["PilotTask", "ensure_tau", "score_pilot"]


_MOST_GROWTH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotTask:
    """A pilot to run on a worker."""

    run: ScoringSpec
    plan: PartSpec
    """A part of the run, whose teacher is measured."""
    sequences: tuple[TokenSequence, ...]
    extent: Extent


def score_pilot(task: PilotTask) -> Pilot:
    """Run a pilot on a worker, which keeps the engine for the parts that follow."""
    teacher = load_teacher(task.run, fold=task.plan.fold)
    return run_pilot(teacher, task.sequences, spec=task.plan, extent=task.extent, reporter=SilentReporter())


def ensure_tau(
    run: ScoringSpec,
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
    if target.is_resolved:
        return target
    assert isinstance(target, ThresholdSketch)  # the only kind that a pilot resolves
    plan = next(run.plan(index, part) for index, part in enumerate(corpus.slices) if part.split == "train")
    extent = Extent(num_parts=len(corpus.slices), num_labels=sum(part.num_labels for part in corpus.slices))
    path = _path(plan, corpus)
    pilot = _read(store, path)
    earlier = _earlier(store, _key(plan, corpus), target, extent) if pilot is None else None
    if earlier is not None:
        if compute:
            # This corpus goes by that tau from now on, whatever becomes of the other pilots.
            store.create_exclusive(path, canonical_json(earlier))
        reporter.say(_line(earlier, target=target, extent=extent, job=job, kept=True))
        return chosen_by(earlier, target=target, job=job)
    if pilot is None:
        if not compute:
            raise ManifestMissing(uri=f"{store.uri}/{path}", stage="targets")
        reporter.say("pilot: a few sequences, to find the tau that the target asks for")
        store.create_exclusive(path, canonical_json(_run_on(cluster(), run, plan, corpus, extent)))
        pilot = _read(store, path)
        assert pilot is not None
    reporter.say(_line(pilot, target=target, extent=extent, job=job, kept=False))
    return chosen_by(pilot, target=target, job=job)


def _line(pilot: Pilot, *, target: SketchSettings, extent: Extent, job: str, kept: bool) -> str:
    row = _chosen_row(pilot, chosen_by(pilot, target=target, job=job))
    return (
        f"pilot: tau {row.sketch.setting}{' of an earlier corpus kept' if kept else ''},"
        f" {row.bytes_per_position_at(extent):.1f} bytes a position,"
        f" gradient angle {row.gradient_angle_degrees:.1f} degrees on {pilot.num_sequences} sequences"
    )


def _chosen_row(pilot: Pilot, sketch: SketchSettings) -> Measured:
    (row,) = (row for row in pilot.rows if row.sketch == sketch)
    return row


def _earlier(store: Store, key: str, target: ThresholdSketch, extent: Extent) -> Pilot | None:
    """Of the pilots of other corpora whose tau keeps the budget, one of the largest tau: the last that was found.

    A pilot speaks for a corpus of the same sources with half to twice its labels. One is made where none before it
    keeps the budget, and a budget of bytes is then kept by a larger tau. An angle is taken to be kept.
    """
    keeping: list[tuple[float, Pilot]] = []
    for path in store.list("pilot"):
        if path.startswith(f"pilot/{key}-") and path.endswith(".json"):
            pilot = _read(store, path)
            if pilot is not None and isinstance(pilot.chosen, ThresholdSketch) and _speaks_for(pilot, extent):
                needed = _chosen_row(pilot, pilot.chosen).bytes_per_position_at(extent)
                if target.budget_bytes is None or needed <= target.budget_bytes:
                    keeping.append((pilot.chosen.tau, pilot))
    return max(keeping, key=lambda found: found[0])[1] if keeping else None


def _speaks_for(pilot: Pilot, extent: Extent) -> bool:
    return pilot.num_run_labels / _MOST_GROWTH <= extent.num_labels <= pilot.num_run_labels * _MOST_GROWTH


def _key(plan: PartSpec, corpus: CorpusManifest) -> str:
    sources = sorted((source.name, source.style) for source in corpus.sources)
    return canonical_digest([plan.teacher, plan.sketch, plan.seed, NUM_SEQUENCES, sources])[:32]


def _path(plan: PartSpec, corpus: CorpusManifest) -> str:
    return f"pilot/{_key(plan, corpus)}-{corpus.digest[:16]}.json"


def _read(store: Store, path: str) -> Pilot | None:
    try:
        return Pilot.model_validate_json(store.read(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=f"is not a pilot: {error.errors()[0]['msg']}") from error


def _run_on(cluster: Cluster, run: ScoringSpec, plan: PartSpec, corpus: CorpusManifest, extent: Extent) -> Pilot:
    slices = [part for part in corpus.slices if (part.split, part.fold) == (plan.split, plan.fold)]
    pilot = PilotTask(
        run=run,
        plan=plan,
        sequences=tuple(_spread_over(open_store(run.corpus), slices)),
        extent=extent,
    )
    done: list[Pilot] = []
    failures = cluster.map_tasks(
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
