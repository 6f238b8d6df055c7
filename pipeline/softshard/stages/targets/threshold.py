"""The tau of a target that has a budget: found once, by a pilot on the cluster, and stored.

The pilot's table is stored in `targets/pilot/`, created exclusively under two digests: one of teacher, target, seed and
sources, and one of the corpus. So every later run, and one that runs at the same time, uses the same tau. A changed
corpus keeps the tau of an earlier pilot as long as that keeps the budget, so that unchanged parts keep their ids. A
pilot that is stopped leaves nothing.
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
    """A pilot to execute on a worker."""

    scoring: ScoringSpec
    part: PartSpec
    """A part of the run, whose teacher is measured."""
    sequences: tuple[TokenSequence, ...]
    extent: Extent


def score_pilot(task: PilotTask) -> Pilot:
    """Execute a pilot on a worker, which keeps the engine for the parts that follow."""
    teacher = load_teacher(task.scoring, fold=task.part.fold)
    return run_pilot(teacher, task.sequences, spec=task.part, extent=task.extent, reporter=SilentReporter())


def ensure_tau(
    spec: ScoringSpec,
    corpus: CorpusManifest,
    reporter: Reporter,
    cluster: Callable[[], Cluster],
    *,
    job: str,
    compute: bool,
) -> SketchSettings:
    """The sketch settings of a run's parts, with a tau: the job's own, or that of a pilot, which runs if missing.

    Args:
        spec: with the job's own sketch settings.
        corpus: the corpus that the pilot's sequences are from.
        reporter: where progress goes.
        cluster: opens the cluster.
        job: name of the job, for errors.
        compute: whether a missing pilot is executed.

    Raises:
        ManifestMissing: the pilot is missing and `compute` is false.
        JobInvalid: no tau keeps the budget.
        PartsFailed: the pilot was set aside.
    """
    target, store = spec.sketch, open_store(spec.targets)
    if target.is_resolved:
        return target
    assert isinstance(target, ThresholdSketch)  # the only kind that a pilot resolves
    part = next(spec.part_spec(index, part) for index, part in enumerate(corpus.slices) if part.split == "train")
    extent = Extent(num_parts=len(corpus.slices), num_labels=sum(part.num_labels for part in corpus.slices))
    path = _path(part, corpus)
    pilot = _read(store, path)
    earlier = _find_earlier(store, _key(part, corpus), target, extent) if pilot is None else None
    if earlier is not None:
        if compute:
            # From now on this corpus uses that tau, whatever happens to the other pilots.
            store.create_exclusive(path, canonical_json(earlier))
        reporter.say(_describe(earlier, target=target, extent=extent, job=job, is_earlier=True))
        return chosen_by(earlier, target=target, job=job)
    if pilot is None:
        if not compute:
            raise ManifestMissing(uri=f"{store.uri}/{path}", stage="targets")
        reporter.say("pilot: scoring a few sequences to find the tau that keeps the target's budget")
        store.create_exclusive(path, canonical_json(_run_pilot_on(cluster(), spec, part, corpus, extent)))
        pilot = _read(store, path)
        assert pilot is not None
    reporter.say(_describe(pilot, target=target, extent=extent, job=job, is_earlier=False))
    return chosen_by(pilot, target=target, job=job)


def _describe(pilot: Pilot, *, target: SketchSettings, extent: Extent, job: str, is_earlier: bool) -> str:
    row = _chosen_row(pilot, chosen_by(pilot, target=target, job=job))
    return (
        f"pilot: tau {row.sketch.setting}{' of an earlier corpus kept' if is_earlier else ''},"
        f" {row.bytes_per_position_at(extent):.1f} bytes per position,"
        f" gradient angle {row.gradient_angle_degrees:.1f} degrees on {pilot.num_sequences} sequences"
    )


def _chosen_row(pilot: Pilot, sketch: SketchSettings) -> Measured:
    (row,) = (row for row in pilot.rows if row.sketch == sketch)
    return row


def _find_earlier(store: Store, key: str, target: ThresholdSketch, extent: Extent) -> Pilot | None:
    """The pilot of another corpus with the largest tau among those that keep the budget; None where there is none.

    A pilot applies to a corpus of the same sources with half to twice its labels. Where none keeps a budget of bytes, a
    new pilot finds a larger tau. A budget of angle is assumed to be kept.
    """
    keeping: list[tuple[float, Pilot]] = []
    for path in store.list("pilot"):
        if path.startswith(f"pilot/{key}-") and path.endswith(".json"):
            pilot = _read(store, path)
            if pilot is not None and isinstance(pilot.chosen, ThresholdSketch) and _applies_to(pilot, extent):
                needed = _chosen_row(pilot, pilot.chosen).bytes_per_position_at(extent)
                if target.budget_bytes is None or needed <= target.budget_bytes:
                    keeping.append((pilot.chosen.tau, pilot))
    return max(keeping, key=lambda found: found[0])[1] if keeping else None


def _applies_to(pilot: Pilot, extent: Extent) -> bool:
    return pilot.num_run_labels / _MOST_GROWTH <= extent.num_labels <= pilot.num_run_labels * _MOST_GROWTH


def _key(part: PartSpec, corpus: CorpusManifest) -> str:
    sources = sorted((source.name, source.style) for source in corpus.sources)
    return canonical_digest([part.teacher, part.sketch, part.seed, NUM_SEQUENCES, sources])[:32]


def _path(part: PartSpec, corpus: CorpusManifest) -> str:
    return f"pilot/{_key(part, corpus)}-{corpus.digest[:16]}.json"


def _read(store: Store, path: str) -> Pilot | None:
    try:
        return Pilot.model_validate_json(store.read(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=f"is not a pilot: {error.errors()[0]['msg']}") from error


def _run_pilot_on(cluster: Cluster, spec: ScoringSpec, part: PartSpec, corpus: CorpusManifest, extent: Extent) -> Pilot:
    slices = [each for each in corpus.slices if (each.split, each.fold) == (part.split, part.fold)]
    sequences = tuple(_spread_over(open_store(spec.corpus), slices))
    task = PilotTask(scoring=spec, part=part, sequences=sequences, extent=extent)
    done: list[Pilot] = []
    failures = cluster.map_tasks(
        score_pilot, [task], name=lambda _: "pilot", on_result=lambda _, pilot, __: done.append(pilot)
    )
    if failures:
        raise PartsFailed(failures=failures, out=spec.targets)
    return done[0]


def _spread_over(store: Store, slices: Sequence[CorpusSlice]) -> list[TokenSequence]:
    """The sequences of a pilot, at equal distances over the slices; reads only slices that hold one."""
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
