"""The training data of a job: its own targets and those of other jobs, filtered and weighted.

The sets share one tokenizer. Authors and groups are columns of the targets themselves, so another job's corpus need not
exist any more. Which sources name their authors, and who gave consent, is read from the `job.yaml` of each output;
where there is none, every group counts as an author, and nobody has given consent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softshard.config import (
    LabelWeightSettings,
    OptimizerSettings,
    SourceSettings,
    TrainSettings,
    WeightOverSteps,
    WhereSettings,
    weight_at,
)
from softshard.data.authors import Credit
from softshard.data.blend import Blend
from softshard.data.dataset import SoftLabelDataset
from softshard.data.filters import RowFilter
from softshard.data.groups import Balance, Tally, balanced, tally_groups
from softshard.data.mix import MixWeights, SoftLabelMix
from softshard.data.mixing import LabelWeights
from softshard.data.target_set import TargetSet
from softshard.errors import BlendInvalid, JobInvalid, TargetsUnsuitable
from softshard.models import check_tokenizer
from softshard.output.status import job_values
from softshard.output.workspace import Workspace
from softshard.records.digest import canonical_digest
from softshard.shard.manifest import Manifest, SourceRights, read_manifest
from softshard.storage import open_store

__all__ = [
    "TrainingData",
    "WeightedTargets",
    "make_label_weights",
    "make_row_filter",
    "open_training_data",
    "other_sets",
    "refuse_unfit",
    "source_credits",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedTargets:
    """One set of targets, with its weight in the training data."""

    targets: TargetSet
    weight: WeightOverSteps
    """Scaled so that the largest weight of all sets and steps is 1."""
    credited: dict[str, Credit]
    """Who wrote it, as far as the job says, by source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What every training of a job is trained on."""

    sets: tuple[WeightedTargets, ...]
    how: str
    """`mix` or `blend`; `mix` for a single set."""
    balance: Balance | None
    holdout: str
    """Digest of the job's own hold-out, on which every training is measured."""

    @property
    def temperature(self) -> float:
        """The temperature at which the targets of all sets were made."""
        return self.sets[0].targets.manifest.sketch.temperature

    @property
    def leaves_ghost(self) -> bool:
        """Whether the targets of some set leave out tokens, of which only the total mass is stored."""
        return any(each.targets.manifest.sketch.leaves_ghost for each in self.sets)

    @property
    def sources(self) -> tuple[SourceRights, ...]:
        """Sources of all sets, each once."""
        return tuple(dict.fromkeys(source for each in self.sets for source in each.targets.manifest.sources))

    @property
    def steps(self) -> list[int]:
        """Steps at which a weight changes, and step 0."""
        points = (each.weight for each in self.sets if isinstance(each.weight, tuple))
        return sorted({0, *(step for weight in points for step, _ in weight)})

    def weights(self, step: int) -> tuple[float, ...]:
        """Weights of the sets at a step."""
        return tuple(weight_at(each.weight, step) for each in self.sets)

    def digest_parts(self) -> list[Any]:
        """Everything that can change a batch or the measurements, as plain values; part of every training's id."""
        sets = [[each.targets.manifest.digest, each.targets.where.conditions, each.weight] for each in self.sets]
        groups = None if self.balance is None else self.balance.weights.digest_parts()
        return [self.how, sets, groups, self.holdout]

    def dataset(self, settings: TrainSettings, *, alpha: float, optimizer: OptimizerSettings, seed: int) -> Any:
        """The dataset of one training, at its first batch.

        Raises:
            BlendInvalid, BlendIncomplete, TargetsUnsuitable: the sets do not fit together or do not fit the settings.
        """
        common: dict[str, Any] = {
            "seed": seed,
            "batch_tokens": optimizer.batch_tokens,
            "shuffle_buffer": settings.shuffle_buffer,
            "alpha": alpha,
            "truncated": settings.truncated,
            "temperature": settings.temperature,
            "weights": make_label_weights(settings.label_weights),
            "packing": settings.packing,
            "rank": 0,
            "world_size": 1,
        }
        sets = tuple(each.targets for each in self.sets)
        if len(sets) == 1:
            return SoftLabelDataset(sets[0], **common)
        if self.how == "blend":
            return SoftLabelDataset(Blend(sets=sets, weights=self.weights(0)), **common)
        datasets = [SoftLabelDataset(targets, **{**common, "prefetch": 0}) for targets in sets]
        points = tuple((step, self.weights(step)) for step in self.steps)
        return SoftLabelMix(datasets, MixWeights(points=points), rank=0, world_size=1)


def open_training_data(workspace: Workspace, manifest: Manifest) -> TrainingData:
    """The training data of a job.

    Raises:
        ManifestMissing, JobInvalid: another job's targets are missing.
        TokenizerMismatch, BlendInvalid, TargetsUnsuitable: another set does not fit the student or the job.
        BalanceImpossible: its groups cannot have their shares.
        FilterMatchesNothing: no row of a set is left.
    """
    settings = workspace.job.train
    own = WeightedTargets(
        targets=TargetSet(store=workspace.targets, manifest=manifest, where=make_row_filter(settings.where)),
        weight=1.0 if settings.targets is None else settings.targets.own_weight,
        credited=source_credits(workspace.job.corpus.sources),
    )
    more = settings.targets
    sets = [own, *other_sets(settings)]
    refuse_unfit(workspace, sets[1:], vocab_size=manifest.vocab_size)
    _refuse_holdout(own, sets[1:])
    if more is not None and more.how == "blend" and own.weight == 0:
        first = replace(sets[1].targets, where=own.targets.where)
        sets[1] = replace(sets[1], targets=first)
    used = _scaled([each for each in sets if each.weight != 0])
    how = more.how if more is not None and len(used) > 1 else "mix"
    holdout = canonical_digest([receipt.sha256 for receipt in manifest.of_split("test")])
    data = TrainingData(sets=used, how=how, balance=None, holdout=holdout)
    if settings.balance is None:
        return data
    wanted = settings.balance
    tally = _combined_tally(data, [tally_groups(each.targets, wanted.column) for each in data.sets])
    balance = balanced(tally, column=wanted.column, shares=wanted.shares, clip=wanted.clip)
    weighted = [replace(each, targets=replace(each.targets, groups=balance.weights)) for each in data.sets]
    return replace(data, sets=tuple(weighted), balance=balance)


def _scaled(sets: Sequence[WeightedTargets]) -> tuple[WeightedTargets, ...]:
    """The sets with their weights divided by the largest, so that a common factor changes neither batches nor ids.

    A single set gets the weight 1.
    """
    if len(sets) == 1:
        return (replace(sets[0], weight=1.0),)
    largest = max(value for each in sets for value in _values(each.weight))

    def scaled(value: float) -> float:
        # Rounded so that the thirds of .3 and of 3 come out equal.
        return float(f"{value / largest:.12g}")

    def over(weight: WeightOverSteps) -> WeightOverSteps:
        if isinstance(weight, tuple):
            return tuple((step, scaled(value)) for step, value in weight)
        return scaled(weight)

    return tuple(replace(each, weight=over(each.weight)) for each in sets)


def _values(weight: WeightOverSteps) -> Iterator[float]:
    yield from (value for _, value in weight) if isinstance(weight, tuple) else (weight,)


def _refuse_holdout(own: WeightedTargets, others: Sequence[WeightedTargets]) -> None:
    """Refuse sets that would train on documents of the job's hold-out. Raises BlendInvalid."""
    if not others or not own.targets.manifest.of_split("test"):
        return
    held = set(tally_groups(replace(own.targets, split="test", where=RowFilter()), "document_id"))
    for other in others:
        if known := held & set(tally_groups(other.targets, "document_id")):
            problem = (
                f"its train split has {len(known)} of the {len(held)} documents that this job holds out and is measured"
                " on; give both jobs the same `seed` and `corpus.holdout_fraction`"
            )
            raise BlendInvalid(uri=other.targets.store.uri, problem=problem)


def other_sets(settings: TrainSettings) -> list[WeightedTargets]:
    """The targets of other jobs that the job trains on, each with the weight that the job gives it.

    Raises:
        ManifestMissing, JobInvalid, PartCorrupt: they are missing or damaged.
    """
    more = settings.targets
    found = []
    for other in () if more is None else more.others:
        store = open_store(other.out).below("targets")
        manifest = read_manifest(store, digest=other.manifest)
        targets = TargetSet(store=store, manifest=manifest, where=make_row_filter(other.where))
        found.append(WeightedTargets(targets=targets, weight=other.weight, credited=_credits_in(other.out)))
    return found


def refuse_unfit(workspace: Workspace, others: Sequence[WeightedTargets], *, vocab_size: int) -> None:
    """Refuse targets of other jobs that the student could not be trained on beside the job's own.

    Raises:
        TokenizerMismatch: they were made with another tokenizer than the student's.
        BlendInvalid: their vocabulary has not `vocab_size` tokens.
        TargetsUnsuitable: the settings do not suit them.
    """
    student, settings, made_with = workspace.student_model, workspace.job.train, workspace.teacher_model.tokenizer
    for other in others:
        uri, manifest = other.targets.store.uri, other.targets.manifest
        fingerprint = manifest.tokenizer_fingerprint
        check_tokenizer(
            student.tokenizer, model=student.name, data=uri, data_fingerprint=fingerprint, made_with=made_with
        )
        if manifest.vocab_size != vocab_size:
            problem = f"its vocabulary has {manifest.vocab_size} tokens, that of the job's own targets {vocab_size}"
            raise BlendInvalid(uri=uri, problem=problem)
        if (unfit := settings.problem_with(manifest.sketch)) is not None:
            raise TargetsUnsuitable(uri=uri, problem=str(unfit))


def source_credits(sources: Iterable[SourceSettings]) -> dict[str, Credit]:
    """Who wrote the sources of a job, as far as it says, by source name."""
    return {
        source.name: Credit(named=source.group_field is not None, consent=frozenset(source.consent))
        for source in sources
    }


def _credits_in(out: str) -> dict[str, Credit]:
    """The same for another job, from the `job.yaml` of its output; empty where there is none."""
    try:
        values = job_values(open_store(out))
        return {
            source["name"]: Credit(
                named=source.get("group_field") is not None, consent=frozenset(source.get("consent", ()))
            )
            for source in values["corpus"]["sources"]
        }
    except (JobInvalid, KeyError, TypeError):
        return {}


def _combined_tally(data: TrainingData, tallies: list[Tally]) -> Tally:
    """The tallies of all sets as shares, weighted by set; a blend has the sequences of the first set only."""
    if len(data.sets) == 1 or data.how == "blend":
        return tallies[0]
    shares: Tally = {}
    for tally, weight in zip(tallies, data.weights(0), strict=True):
        for group, count in tally.items():
            shares[group] = shares.get(group, 0.0) + weight * count / sum(tally.values())
    return dict(sorted(shares.items()))


def make_row_filter(where: WhereSettings) -> RowFilter:
    """The row filter of the job."""
    return RowFilter(**where.model_dump())


def make_label_weights(settings: LabelWeightSettings) -> LabelWeights:
    """The label weights of the job."""
    return LabelWeights(entropy=settings.entropy, label_logprob=settings.label_logprob)
