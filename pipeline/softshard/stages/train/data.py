"""What the trainings of a job are fed: its own targets and other jobs', filtered and weighed.

In: the job and its manifest. Out: target sets of one tokenizer with the weight of each group, and the data set of a
training. Authors and groups are columns of the targets themselves, so that a set whose corpus is gone will do; who
names authors and who gave consent stands in the `job.yaml` of each output. Where there is none, every group is taken
for an author, and nobody has agreed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softshard.config import (
    LabelWeightSettings,
    OptimizerSettings,
    SourceSettings,
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
    "source_credits",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedTargets:
    """One target set of a feed."""

    targets: TargetSet
    weight: WeightOverSteps
    """Of a feed's sets, the largest is 1 at some step."""
    credited: dict[str, Credit]
    """What is known of who wrote it, by source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What every training of a job is fed."""

    sets: tuple[WeightedTargets, ...]
    how: str
    """`mix` or `blend`; of one set, `mix`."""
    balance: Balance | None
    holdout: str
    """Digest of the job's own hold-out, which every training is measured on."""

    @property
    def temperature(self) -> float:
        """At capture, of all sets."""
        return self.sets[0].targets.manifest.sketch.temperature

    @property
    def leaves_ghost(self) -> bool:
        """Whether the targets of some set leave out tokens, of which only the total mass is stored."""
        return any(one.targets.manifest.sketch.leaves_ghost for one in self.sets)

    @property
    def sources(self) -> tuple[SourceRights, ...]:
        """Where the text came from, of all sets, each once."""
        return tuple(dict.fromkeys(source for one in self.sets for source in one.targets.manifest.sources))

    @property
    def steps(self) -> list[int]:
        """Steps at which a weight turns, the first one included."""
        points = (one.weight for one in self.sets if isinstance(one.weight, tuple))
        return sorted({0, *(step for weight in points for step, _ in weight)})

    def weights(self, step: int) -> tuple[float, ...]:
        """Of the sets at a step."""
        return tuple(weight_at(one.weight, step) for one in self.sets)

    def digest_parts(self) -> list[Any]:
        """All that can change a batch or what a training is measured on, as plain values."""
        sets = [[one.targets.manifest.digest, one.targets.where.conditions, one.weight] for one in self.sets]
        groups = None if self.balance is None else self.balance.weights.digest_parts()
        return [self.how, sets, groups, self.holdout]

    def dataset(self, workspace: Workspace, *, alpha: float, optimizer: OptimizerSettings) -> Any:
        """The batches of one training, from their beginning.

        Raises:
            BlendInvalid, BlendIncomplete, TargetsUnsuitable: the sets do not fit together, or not the settings.
        """
        settings = workspace.job.train
        common: dict[str, Any] = {
            "seed": workspace.job.seed,
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
        sets = tuple(one.targets for one in self.sets)
        if len(sets) == 1:
            return SoftLabelDataset(sets[0], **common)
        if self.how == "blend":
            return SoftLabelDataset(Blend(sets=sets, weights=self.weights(0)), **common)
        datasets = [SoftLabelDataset(one, **{**common, "prefetch": 0}) for one in sets]
        points = tuple((step, self.weights(step)) for step in self.steps)
        return SoftLabelMix(datasets, MixWeights(points=points), rank=0, world_size=1)


def open_training_data(workspace: Workspace, manifest: Manifest) -> TrainingData:
    """The feed of a job's trainings.

    Raises:
        ManifestMissing, JobInvalid: another job's targets are not there.
        TokenizerMismatch, BlendInvalid, TargetsUnsuitable: another set does not fit the student, or the job.
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
    sets = [own, *other_sets(workspace)]
    _refuse_unfit(workspace, sets[1:], vocab_size=manifest.vocab_size)
    _refuse_holdout(own, sets[1:])
    if more is not None and more.how == "blend" and own.weight == 0:
        first = replace(sets[1].targets, where=own.targets.where)
        sets[1] = replace(sets[1], targets=first)
    used = _scaled([one for one in sets if one.weight != 0])
    how = more.how if more is not None and len(used) > 1 else "mix"
    holdout = canonical_digest([receipt.sha256 for receipt in manifest.of_split("test")])
    feed = TrainingData(sets=used, how=how, balance=None, holdout=holdout)
    if settings.balance is None:
        return feed
    asked = settings.balance
    tally = _together(feed, [tally_groups(one.targets, asked.column) for one in feed.sets])
    balance = balanced(tally, column=asked.column, shares=asked.shares, clip=asked.clip)
    weighed = [replace(one, targets=replace(one.targets, groups=balance.weights)) for one in feed.sets]
    return replace(feed, sets=tuple(weighed), balance=balance)


def _scaled(sets: Sequence[WeightedTargets]) -> tuple[WeightedTargets, ...]:
    """The sets with weights over the largest of them, so that a common factor changes nothing, nor any id.

    One alone has the weight 1, whatever it was given.
    """
    if len(sets) == 1:
        return (replace(sets[0], weight=1.0),)
    largest = max(value for one in sets for value in _values(one.weight))

    def scaled(value: float) -> float:
        # Thirds of .3 and of 3 must come out alike.
        return float(f"{value / largest:.12g}")

    def over(weight: WeightOverSteps) -> WeightOverSteps:
        if isinstance(weight, tuple):
            return tuple((step, scaled(value)) for step, value in weight)
        return scaled(weight)

    return tuple(replace(one, weight=over(one.weight)) for one in sets)


def _values(weight: WeightOverSteps) -> Iterator[float]:
    yield from (value for _, value in weight) if isinstance(weight, tuple) else (weight,)


def _refuse_holdout(own: WeightedTargets, others: Sequence[WeightedTargets]) -> None:
    """Refuse sets that would train on what the job measures on. Raises BlendInvalid."""
    if not others or not own.targets.manifest.of_split("test"):
        return
    held = set(tally_groups(replace(own.targets, split="test", where=RowFilter()), "document_id"))
    for one in others:
        if known := held & set(tally_groups(one.targets, "document_id")):
            problem = (
                f"its train split has {len(known)} of the {len(held)} documents that this job holds out and is measured"
                " on; give both jobs the same `seed` and `corpus.holdout_fraction`"
            )
            raise BlendInvalid(uri=one.targets.store.uri, problem=problem)


def other_sets(workspace: Workspace) -> list[WeightedTargets]:
    """The targets of other jobs that the job names, each with the weight that the job gives it.

    Raises:
        ManifestMissing, JobInvalid, PartCorrupt: they are not there, or not what they should be.
    """
    more = workspace.job.train.targets
    found = []
    for other in () if more is None else more.others:
        store = open_store(other.out).below("targets")
        manifest = read_manifest(store, digest=other.manifest)
        targets = TargetSet(store=store, manifest=manifest, where=make_row_filter(other.where))
        found.append(WeightedTargets(targets=targets, weight=other.weight, credited=_credits_in(other.out)))
    return found


def _refuse_unfit(workspace: Workspace, others: Sequence[WeightedTargets], *, vocab_size: int) -> None:
    settings, student = workspace.job.train, workspace.student_model
    for one in others:
        uri, manifest = one.targets.store.uri, one.targets.manifest
        fingerprint = manifest.tokenizer_fingerprint
        check_tokenizer(student.tokenizer, model=student.name, data=uri, data_fingerprint=fingerprint)
        if manifest.vocab_size != vocab_size:
            problem = f"its vocabulary has {manifest.vocab_size} tokens, that of the job's own targets {vocab_size}"
            raise BlendInvalid(uri=uri, problem=problem)
        if (unfit := settings.problem_with(manifest.sketch)) is not None:
            raise TargetsUnsuitable(uri=uri, problem=str(unfit))


def source_credits(sources: Iterable[SourceSettings]) -> dict[str, Credit]:
    """What a job says of who wrote its sources, by name."""
    return {
        source.name: Credit(named=source.group_field is not None, consent=frozenset(source.consent))
        for source in sources
    }


def _credits_in(out: str) -> dict[str, Credit]:
    """The same of another job, as its own file says; nothing, where there is none."""
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


def _together(feed: TrainingData, tallies: list[Tally]) -> Tally:
    """Tallies of all sets as shares, each set's by its weight; a blend has one set of sequences, the first one's."""
    if len(feed.sets) == 1 or feed.how == "blend":
        return tallies[0]
    shares: Tally = {}
    for tally, weight in zip(tallies, feed.weights(0), strict=True):
        for group, count in tally.items():
            shares[group] = shares.get(group, 0.0) + weight * count / sum(tally.values())
    return dict(sorted(shares.items()))


def make_row_filter(where: WhereSettings) -> RowFilter:
    """The filter that the job asks for."""
    return RowFilter(**where.model_dump())


def make_label_weights(settings: LabelWeightSettings) -> LabelWeights:
    """The weights of labels that the job asks for."""
    return LabelWeights(entropy=settings.entropy, label_logprob=settings.label_logprob)
