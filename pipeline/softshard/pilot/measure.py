"""The pilot: the cost and fidelity of many sketch settings, measured on a few sequences of a corpus.

Reads a teacher that is ready, sequences, and the spec of a part. Returns a table of bytes, error and gradient angle for
a ladder of settings, and the tau for a budget. The same input gives the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softshard.config import SKETCH_KINDS, SketchSettings, ThresholdSketch
from softshard.errors import JobInvalid
from softshard.pilot.search import ThresholdSearch
from softshard.shard.commit import PartSpec, build_part, part_fidelity
from softshard.shard.labels import needed_version
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.teacher.protocol import Teacher
from softshard.telemetry import Reporter

__all__ = [
    "NUM_SEQUENCES",
    "Extent",
    "Measured",
    "Pilot",
    "chosen_by",
    "measure",
    "run_pilot",
    "spread",
]

NUM_SEQUENCES = 16
"""Sequences of a pilot that searches tau for a budget."""
_SEQUENCES_AT_A_TIME = 64
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """All parts of a run."""

    num_parts: int
    num_labels: int


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Measured(_Record):
    """Cost and fidelity of one setting."""

    sketch: SketchSettings
    mean_entries: float
    """Entries per position, in one draw."""
    bytes_per_position: float
    """Bytes of a whole part per position, in parts of the job's size, all draws together."""
    mean_squared_error: float
    gradient_angle_degrees: float
    mean_mass_left_out: float
    """Mass of a target that is never stored: the tail, of a kind that cuts it off; 0 with a sampled tail."""
    num_bytes: int
    """Bytes of all parts of the run."""
    bytes_of_a_part: float
    """Bytes that a part takes independently of its content."""
    bytes_of_a_position: float
    """Bytes that each position adds."""

    def bytes_per_position_at(self, extent: Extent) -> float:
        """`bytes_per_position` in a run of another extent."""
        return self.bytes_of_a_part * extent.num_parts / extent.num_labels + self.bytes_of_a_position


class Pilot(_Record):
    """The rate-distortion table of a corpus and a teacher."""

    num_sequences: int
    num_labels: int
    num_run_labels: int
    """Labels of the corpus that the pilot was made for."""
    chosen: SketchSettings | None
    """The job's setting, with the tau that was found for its budget; null where no tau keeps the budget."""
    rows: tuple[Measured, ...] = Field(min_length=1)
    """By kind, then by entries."""

    @model_validator(mode="after")
    def _chosen_among_rows(self) -> Pilot:
        if self.chosen is not None and self.chosen not in [row.sketch for row in self.rows]:
            raise ValueError("the chosen setting is not in the table")
        return self


class _Tally:
    """Sums over the parts that are built with one setting."""

    def __init__(self, spec: PartSpec) -> None:
        self._spec = spec
        self._fidelity = FidelitySums()
        self._left_out = 0.0
        self._num_parts = self._constant_bytes = self._growing_bytes = 0

    def add(self, rows: Sequence[tuple[TokenSequence, SequenceTargets]], fidelity: FidelitySums) -> None:
        """Build a part of these rows and add its bytes and fidelity."""
        whole, *halves = (len(build_part(self._spec, some, fidelity)[0]) for some in (rows, rows[::2], rows[1::2]))
        constant = sum(halves) - whole
        self._num_parts += 1
        self._constant_bytes += constant
        self._growing_bytes += whole - constant
        self._fidelity += fidelity
        if self._spec.sketch.leaves_ghost:
            self._left_out += sum(float(targets.tail_mass.sum(dtype="float64")) for _, targets in rows)

    def measured(self, extent: Extent) -> Measured:
        """The means over all parts, and the bytes of the whole run."""
        fidelity, labels = self._fidelity, self._fidelity.num_labels
        means = part_fidelity(fidelity, covers_all=self._spec.sketch.covers_vocabulary)
        constant, growing = self._constant_bytes / self._num_parts, self._growing_bytes / labels
        num_bytes = extent.num_parts * constant + extent.num_labels * growing
        return Measured(
            sketch=self._spec.sketch,
            mean_entries=means.mean_entries,
            bytes_per_position=num_bytes / extent.num_labels,
            mean_squared_error=means.mean_squared_error,
            gradient_angle_degrees=means.gradient_angle_degrees,
            mean_mass_left_out=self._left_out / labels,
            num_bytes=round(num_bytes),
            bytes_of_a_part=constant,
            bytes_of_a_position=growing,
        )


def measure(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    *,
    sketches: Sequence[SketchSettings],
    spec: PartSpec,
    extent: Extent,
    reporter: Reporter,
) -> list[Measured]:
    """Cost and fidelity of each setting on the sequences.

    The sequences are built into real parts, 64 at a time. Metadata and dictionaries take a larger share of so small a
    part than of the job's. Their size is estimated as the bytes of two parts that hold every other row each, less the
    bytes of one part with all rows; the remaining bytes grow with the positions. A run is estimated as the former per
    part and the latter per position. Measured on speeches, 16 sequences against a part of 198: the estimate is 2 to 4%
    too high, and bytes divided by positions of the small part 9 to 10%. One sequence cannot be halved, and its estimate
    is higher still.

    Args:
        teacher: ready to score.
        sequences: at least one, better two.
        sketches: the settings, each with its tau.
        spec: any part of the run, for the seed and the metadata.
        extent: the parts of the run.
        reporter: where progress goes.
    """
    version = max(spec.schema_version, needed_version(sequences))
    tallies = [_Tally(replace(spec, sketch=sketch, schema_version=version)) for sketch in sketches]
    num_pieces = -(-len(sequences) // _SEQUENCES_AT_A_TIME)
    with reporter.progress("pilot", total=len(sequences), unit="sequences") as progress:
        done = 0
        for piece in (sequences[first::num_pieces] for first in range(num_pieces)):
            scored = teacher.score_each(piece, sketches=sketches, seed=spec.seed)
            for tally, (targets, fidelity) in zip(tallies, scored, strict=True):
                tally.add(list(zip(piece, targets, strict=True)), fidelity)
            done += len(piece)
            progress(done, note=f"{len(sketches)} setting(s)")
    return [tally.measured(extent) for tally in tallies]


def run_pilot(
    teacher: Teacher, sequences: Sequence[TokenSequence], *, spec: PartSpec, extent: Extent, reporter: Reporter
) -> Pilot:
    """Measure a ladder of thresholds, some other kinds and the job's own setting, `spec.sketch`, on some sequences.

    If it has a budget, thresholds 1/n between 1/2 and 1/512 are measured until 1/n keeps the budget and the adjacent
    one does not. For the arguments see `measure`.
    """
    target = spec.sketch

    def measured(sketches: Sequence[SketchSettings]) -> list[Measured]:
        return measure(teacher, sequences, sketches=sketches, spec=spec, extent=extent, reporter=reporter)

    rows = measured(_ladder(target, vocab_size=spec.vocab_size))
    chosen: SketchSettings | None = target
    if isinstance(target, ThresholdSketch) and not target.is_resolved:
        while wanted := _search(target, rows).wanted:
            rows += measured([ThresholdSketch.with_n(n, like=target) for n in wanted])
        n = _search(target, rows).found
        chosen = None if n is None else ThresholdSketch.with_n(n, like=target)
    kinds = list(SKETCH_KINDS)
    return Pilot(
        num_sequences=len(sequences),
        num_labels=sum(sequence.num_labels for sequence in sequences),
        num_run_labels=extent.num_labels,
        chosen=chosen,
        rows=tuple(sorted(rows, key=lambda row: (kinds.index(row.sketch.kind), row.mean_entries))),
    )


def _ladder(target: SketchSettings, *, vocab_size: int) -> list[SketchSettings]:
    """The settings that every pilot measures, and the job's own where they are complete and not among those."""
    ladder: list[SketchSettings] = []
    for kind in SKETCH_KINDS.values():
        ladder += kind.pilot_ladder(target, vocab_size=vocab_size)
    return [*ladder, target] if target.is_resolved and target not in ladder else ladder


def _search(target: ThresholdSketch, rows: Iterable[Measured]) -> ThresholdSearch:
    by_n = {round(1 / row.sketch.tau): row for row in rows if isinstance(row.sketch, ThresholdSketch)}
    if target.budget_bytes is not None:
        values = {n: row.bytes_per_position for n, row in by_n.items()}
        return ThresholdSearch(values, goal=target.budget_bytes, rising=True)
    assert target.max_angle_degrees is not None
    values = {n: row.gradient_angle_degrees for n, row in by_n.items()}
    return ThresholdSearch(values, goal=target.max_angle_degrees, rising=False)


def chosen_by(pilot: Pilot, *, target: SketchSettings, job: str) -> SketchSettings:
    """The setting that a pilot chose. Raises JobInvalid where no tau between 1/2 and 1/512 keeps the budget."""
    if pilot.chosen is not None:
        return pilot.chosen
    assert isinstance(target, ThresholdSketch)
    by_tau = {row.sketch.tau: row for row in pilot.rows if isinstance(row.sketch, ThresholdSketch)}
    if target.budget_bytes is not None:
        row = by_tau[max(by_tau)]
        nearest = f"takes {row.bytes_per_position:.1f} bytes per position"
    else:
        row = by_tau[min(by_tau)]
        nearest = f"has a gradient angle of {row.gradient_angle_degrees:.2f} degrees"
    problem = f"{target.budget}: even tau {row.sketch.setting} {nearest}; allow more than that"
    raise JobInvalid(file=f"job {job}", place="target", problem=problem)


def spread(items: Sequence[Item], *, num: int) -> list[Item]:
    """`num` items at equal distances; all of them where there are fewer."""
    num = min(num, len(items))
    return [items[at * len(items) // num] for at in range(num)]
