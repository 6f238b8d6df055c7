"""Comparing stored targets with the teacher: some sequences are scored again, by the job's engine or by another.

The output's targets must be complete. The result is the distance between the stored targets and the teacher's present
ones, beside the difference that is allowed: the grids and steps of a part, and the engine's own noise. The noise is
measured, as the difference between scoring the same sequences together and one by one. Tails are sampled, and single
entries may change with the last bits of a running sum, so heads and labels are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softshard.config import SketchSettings
from softshard.config.teacher import EngineName
from softshard.errors import JobInvalid, ModelInvalid
from softshard.output.workspace import Workspace, read_owner, saved_job
from softshard.pilot.measure import spread
from softshard.shard.manifest import Manifest, read_manifest
from softshard.shard.read import Row, read_rows
from softshard.sketch.codec import LOGPROB_GRID, head_weights, mass_grid
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.stages.teacher.stage import StyleTeacher, named_teacher
from softshard.storage import Store, open_store
from softshard.teacher.engines import open_teacher, teacher_identity
from softshard.teacher.protocol import Teacher
from softshard.telemetry import Reporter

__all__ = ["Rescored", "compare", "rescore"]

_LEAST_NOISE_NATS = {"float32": 1e-3, "bfloat16": 0.5}
"""Measured between two engines: vLLM differed from transformers by at most 2e-5 in float32 and .22 in bfloat16."""
_TIMES_NOISE = 4
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference between stored targets and others of the same labels."""

    label_nats: NDArray[np.float64]
    """[P] log-probability of the label."""
    head_weights: NDArray[np.float64]
    """[common entries] weight of a head entry."""
    num_beyond: int
    """Labels and head entries that differ by more than quantisation and noise, or that only one side has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """The result of scoring some stored sequences again."""

    engines: tuple[str, ...]
    num_sequences: int
    num_labels: int
    label_nats_mean: float
    """Difference of the labels' log-probabilities from the stored ones, which lie on a grid of 1/16."""
    label_nats_max: float
    head_weight_mean: float
    head_weight_max: float
    noise_nats: float
    """Largest difference of a label's log-probability between two scorings in different batches."""
    allowed_nats: float
    """Allowed difference in addition to the grid."""
    num_beyond: int
    """Labels and head entries that differ by more."""


def rescore(out: str, reporter: Reporter, *, num: int, engine: EngineName | None = None) -> Rescored:
    """Score some stored sequences again and compare.

    Args:
        out: output folder of a job whose targets are complete.
        reporter: where progress goes.
        num: number of sequences, at equal distances over all.
        engine: the engine that scores; None: the job's.

    Raises:
        JobInvalid: the folder holds no job.
        ManifestMissing: the targets are not complete.
        PartCorrupt: an adapter that the targets were made with is missing, or is not what it was.
        ModelInvalid: the teacher's model is not the one that the targets name.
    """
    if read_owner(out) is None:
        raise JobInvalid(file=out, place="", problem="holds no output of softshard (no job.yaml with a name)")
    store = open_store(out)
    job = saved_job(store)
    if engine is not None:
        job = job.model_copy(update={"teacher": job.teacher.model_copy(update={"engine": engine})})
    workspace = Workspace(job=job, out=store)
    manifest = read_manifest(workspace.targets)
    if manifest.teacher["weights"] != workspace.teacher_model.weights:
        raise ModelInvalid(model=job.teacher.model, problem="is not the model that the targets were made with")
    rows = _some_rows(workspace.targets, manifest, num=num)
    sketch = manifest.sketch
    # Not those that a run would choose now.
    named = named_teacher(workspace.teacher, manifest.teacher.get("adapters", []))
    found, engines = _Tally(), set()
    with reporter.progress("rescore", total=sum(len(part) for part in rows.values()), unit="sequences") as progress:
        for fold, part in rows.items():
            teacher = _open_teacher(workspace, named, fold)
            engines.add(str(teacher.identity["engine"]))
            found.add(teacher, part, sketch=sketch, seed=manifest.seed)
            teacher.close()
            progress(found.num_sequences)
    return found.result(tuple(sorted(engines)))


def _some_rows(store: Store, manifest: Manifest, *, num: int) -> dict[int, list[Row]]:
    """Rows at equal distances over all parts, by fold; reads only parts that hold one."""
    wanted = spread(range(manifest.totals.num_sequences), num=num)
    chosen: dict[int, list[Row]] = {}
    first = 0
    for receipt in manifest.parts:
        inside = {place - first for place in wanted if first <= place < first + receipt.num_sequences}
        if inside:
            rows = [row for at, (row, _) in enumerate(read_rows(store, receipt)) if at in inside]
            chosen.setdefault(receipt.fold, []).extend(rows)
        first += receipt.num_sequences
    return chosen


def _open_teacher(workspace: Workspace, named: StyleTeacher, fold: int) -> Teacher:
    settings, model, adapters = workspace.job.teacher, workspace.teacher_model, named.of_fold(fold)
    identity = teacher_identity(
        settings,
        context_tokens=workspace.job.corpus.context_tokens,
        weights=model.weights,
        adapters=[receipt.digest for receipt in adapters],
    )
    return open_teacher(
        model.folder,
        adapters=[workspace.teacher.local_folder(receipt.folder, receipt.weight_files) for receipt in adapters],
        identity=identity,
        device=settings.device,
        vocab_size=model.tokenizer.vocab_size,
    )


class _Tally:
    """Differences of all folds together."""

    def __init__(self) -> None:
        self.num_sequences = 0
        self._differences: list[Difference] = []
        self._noise = self._allowed = 0.0

    def add(self, teacher: Teacher, rows: Sequence[Row], *, sketch: SketchSettings, seed: int) -> None:
        """Score sequences together and one by one, and compare with what is stored."""
        sequences: list[TokenSequence] = [sequence for sequence, _ in rows]
        together, _ = teacher.score(sequences, sketch=sketch, seed=seed)
        alone = [teacher.score([sequence], sketch=sketch, seed=seed)[0][0] for sequence in sequences]
        pairs = zip(together, alone, strict=True)
        noise = max(float(np.abs(one.label_logprob - other.label_logprob).max(initial=0)) for one, other in pairs)
        allowed = max(_TIMES_NOISE * noise, _LEAST_NOISE_NATS[str(teacher.identity["dtype"])])
        for (_, stored), again in zip(rows, together, strict=True):
            self._differences.append(compare(stored, again, sketch, noise_nats=allowed))
        self.num_sequences += len(rows)
        self._noise, self._allowed = max(self._noise, noise), max(self._allowed, allowed)

    def result(self, engines: tuple[str, ...]) -> Rescored:
        """Means and largest of all."""
        labels = np.concatenate([difference.label_nats for difference in self._differences])
        heads = np.concatenate([difference.head_weights for difference in self._differences])
        return Rescored(
            engines=engines,
            num_sequences=self.num_sequences,
            num_labels=len(labels),
            label_nats_mean=float(labels.mean()),
            label_nats_max=float(labels.max()),
            head_weight_mean=float(heads.mean()) if len(heads) else 0.0,
            head_weight_max=float(heads.max(initial=0)),
            noise_nats=self._noise,
            allowed_nats=self._allowed,
            num_beyond=sum(difference.num_beyond for difference in self._differences),
        )


def compare(
    stored: SequenceTargets, again: SequenceTargets, sketch: SketchSettings, *, noise_nats: float
) -> Difference:
    """Stored targets, as a reader has them, against targets as an engine gives them.

    A head entry's weight is off by at most p (e^step - 1), and by half a grid of the tail mass. An entry that only one
    of them has must lie at the border of the head: at tau, or where the label's least likely entry is.

    Args:
        stored: decoded from a part.
        again: of the same sequence.
        sketch: settings of both.
        noise_nats: what is allowed beside quantisation.
    """
    labels = np.abs(stored.label_logprob.astype(np.float64) - again.label_logprob)
    beyond = int((labels > LOGPROB_GRID / 2 + noise_nats + _ROUNDING).sum())
    places = _places(stored), _places(again)
    weights = head_weights(stored.head_logprobs, stored.head_count, 1 - stored.tail_mass).astype(np.float64)
    exact = np.exp(again.head_logprobs.astype(np.float64))
    _, ours, theirs = np.intersect1d(places[0], places[1], assume_unique=True, return_indices=True)
    heads = np.abs(weights[ours] - exact[theirs])
    slack = np.expm1(sketch.step + noise_nats)
    rounded = mass_grid(sketch.tail_weight) / 2 + _ROUNDING
    beyond += int((heads > exact[theirs] * slack + rounded).sum())
    for own, probabilities, other in ((places[0], weights, places[1]), (places[1], exact, places[0])):
        alone = ~np.isin(own, other)
        border = _border(stored, weights, sketch)[own[alone] >> 32]
        beyond += int((probabilities[alone] > border * (1 + slack) + rounded).sum())
    return Difference(label_nats=labels, head_weights=heads, num_beyond=beyond)


def _places(targets: SequenceTargets) -> NDArray[np.int64]:
    """[H] label and token of each head entry in one number."""
    labels = np.repeat(np.arange(targets.num_labels, dtype=np.int64), targets.head_count)
    return (labels << 32) + targets.head_ids


def _border(stored: SequenceTargets, weights: NDArray[np.float64], sketch: SketchSettings) -> NDArray[np.float64]:
    """[P] how likely the least likely entry of each label's head is."""
    if sketch.tail_weight is not None:
        return np.full(stored.num_labels, sketch.tail_weight)
    least = np.full(stored.num_labels, np.inf)
    np.minimum.at(least, np.repeat(np.arange(stored.num_labels), stored.head_count), weights)
    return np.where(np.isfinite(least), least, 0.0)
