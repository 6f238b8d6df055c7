"""What the trainings of a job are fed: its own targets and other jobs', filtered, weighed, and within the author cap.

In: the job and its manifest. Out: target sets of one tokenizer with the weight of each group, and the data set of a
training. Authors and groups are columns of the targets themselves, so that a set whose corpus is gone will do; who gave
consent stands in the `job.yaml` of each output, and where there is none, nobody has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softshard.config import LabelWeightSettings, OptimizerSettings, WeightOverSteps, WhereSettings, weight_at
from softshard.errors import AuthorDominates, BlendInvalid, JobInvalid, TargetsUnsuitable
from softshard.models import check_tokenizer
from softshard.run.status import job_values
from softshard.run.workspace import Workspace
from softshard.shard.manifest import Manifest, SourceRights, read_manifest
from softshard.storage import open_store
from softshard.train.blend import Blend
from softshard.train.dataset import SoftLabelDataset
from softshard.train.filters import RowFilter
from softshard.train.groups import Balance, Tally, balanced, tally_authors, tally_groups
from softshard.train.mix import MixWeights, SoftLabelMix
from softshard.train.mixed import LabelWeights
from softshard.train.reading import TargetSet

__all__ = ["Feed", "FeedSet", "check_authors", "open_feed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSet:
    """One target set of a feed."""

    targets: TargetSet
    weight: WeightOverSteps
    consent: dict[str, frozenset[str]]
    """Authors who agreed, by source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What every training of a job is fed."""

    sets: tuple[FeedSet, ...]
    how: str
    """`mix` or `blend`; of one set, either."""
    balance: Balance | None

    @property
    def temperature(self) -> float:
        """At capture, of all sets."""
        return float(self.sets[0].targets.manifest.target["temperature"])

    @property
    def kinds(self) -> set[str]:
        """Kinds of sketch."""
        return {str(one.targets.manifest.target["kind"]) for one in self.sets}

    @property
    def sources(self) -> tuple[SourceRights, ...]:
        """Where the text came from, of all sets, each once."""
        return tuple(dict.fromkeys(source for one in self.sets for source in one.targets.manifest.sources))

    def digest_parts(self) -> list[Any]:
        """All that can change a batch, as plain values."""
        sets = [[one.targets.manifest.digest, one.targets.where.conditions, one.weight] for one in self.sets]
        return [self.how, sets, None if self.balance is None else self.balance.weights.digest_parts()]

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
            "weights": _label_weights(settings.label_weights),
            "packing": settings.packing,
            "rank": 0,
            "world_size": 1,
        }
        sets = tuple(one.targets for one in self.sets)
        if len(sets) == 1:
            return SoftLabelDataset(sets[0], **common)
        if self.how == "blend":
            weights = tuple(weight_at(one.weight, 0) for one in self.sets)
            return SoftLabelDataset(Blend(sets=sets, weights=weights), **common)
        datasets = [SoftLabelDataset(one, **{**common, "prefetch": 0}) for one in sets]
        points = tuple((step, tuple(weight_at(one.weight, step) for one in self.sets)) for step in _steps(self.sets))
        return SoftLabelMix(datasets, MixWeights(points=points), rank=0, world_size=1)


def open_feed(workspace: Workspace, manifest: Manifest) -> Feed:
    """The feed of a job's trainings.

    Raises:
        ManifestMissing, JobInvalid: another job's targets are not there.
        TokenizerMismatch, BlendInvalid, TargetsUnsuitable: another set does not fit the student, or the job.
        BalanceImpossible: its groups cannot have their shares.
    """
    settings = workspace.job.train
    own = FeedSet(
        targets=TargetSet(store=workspace.targets, manifest=manifest, where=_row_filter(settings.where)),
        weight=1.0 if settings.targets is None else settings.targets.own_weight,
        consent={source.name: frozenset(source.consent) for source in workspace.job.corpus.sources},
    )
    more = settings.targets
    sets = [own, *_others(workspace, manifest)]
    _refuse_holdout(own, sets[1:])
    if more is not None and more.how == "blend" and own.weight == 0:
        first = replace(sets[1].targets, where=own.targets.where)
        sets[1] = replace(sets[1], targets=first)
    feed = Feed(sets=tuple(one for one in sets if one.weight != 0), how=more.how if more else "mix", balance=None)
    if settings.balance is None:
        return feed
    asked = settings.balance
    tally = _together(feed, [tally_groups(one.targets, asked.column) for one in feed.sets], step=0)
    balance = balanced(tally, column=asked.column, shares=asked.shares, clip=asked.clip)
    weighed = [replace(one, targets=replace(one.targets, groups=balance.weights)) for one in feed.sets]
    return replace(feed, sets=tuple(weighed), balance=balance)


def _refuse_holdout(own: FeedSet, others: Sequence[FeedSet]) -> None:
    """Refuse sets that would train on what the job measures on. Raises BlendInvalid."""
    if not others:
        return
    held = set(tally_groups(replace(own.targets, split="test", where=RowFilter()), "document_id"))
    for one in others:
        if known := held & set(tally_groups(one.targets, "document_id")):
            problem = (
                f"its train split has {len(known)} of the {len(held)} documents that this job holds out and is measured"
                " on; give both jobs the same `seed` and `corpus.holdout_fraction`"
            )
            raise BlendInvalid(uri=one.targets.store.uri, problem=problem)


def _others(workspace: Workspace, manifest: Manifest) -> list[FeedSet]:
    settings, student = workspace.job.train, workspace.student_model
    found = []
    for other in () if settings.targets is None else settings.targets.others:
        out = open_store(other.out)
        store = out.below("targets")
        theirs = read_manifest(store, digest=other.manifest)
        print_of = theirs.tokenizer_fingerprint
        check_tokenizer(student.tokenizer, model=student.name, data=store.uri, data_fingerprint=print_of)
        if theirs.vocab_size != manifest.vocab_size:
            problem = (
                f"its vocabulary has {theirs.vocab_size} tokens, that of the job's own targets {manifest.vocab_size}"
            )
            raise BlendInvalid(uri=store.uri, problem=problem)
        if (unfit := settings.problem_with(str(theirs.target["kind"]))) is not None:
            raise TargetsUnsuitable(uri=store.uri, problem=unfit)
        targets = TargetSet(store=store, manifest=theirs, where=_row_filter(other.where))
        found.append(FeedSet(targets=targets, weight=other.weight, consent=_consent_in(other.out)))
    return found


def _consent_in(out: str) -> dict[str, frozenset[str]]:
    """Who agreed, as another job's own file says; nobody, where there is none."""
    try:
        values = job_values(open_store(out))
        sources = values["corpus"]["sources"]
        return {source["name"]: frozenset(source.get("consent", ())) for source in sources}
    except (JobInvalid, KeyError, TypeError):
        return {}


def check_authors(feed: Feed, *, cap: float) -> Tally:
    """Share of each author of the train tokens, by name; where weights change, the most at any step.

    Tokens are labels of sequences that pass the filters, each once, whatever they weigh in the loss. Writing under
    consent, and of sources that name no authors, has part in the sum and in no author's share.

    Raises:
        AuthorDominates: one has more than `cap`.
    """
    tallies = [tally_authors(one.targets, consent=one.consent) for one in feed.sets]
    most: Tally = {}
    for step in _steps(feed.sets):
        together = _together(feed, tallies, step=step)
        for author, share in together.items():
            if author:
                most[author] = max(share / sum(together.values()), most.get(author, 0.0))
    for author, share in sorted(most.items(), key=lambda item: (-item[1], item[0])):
        if share > cap:
            raise AuthorDominates(author=author, share=share, cap=cap)
    return dict(sorted(most.items()))


def _together(feed: Feed, tallies: list[Tally], *, step: int) -> Tally:
    """Tallies of all sets as shares, each set's by its weight; a blend has one set of sequences, the first one's."""
    if len(feed.sets) == 1 or feed.how == "blend":
        return tallies[0]
    shares: Tally = {}
    for one, tally in zip(feed.sets, tallies, strict=True):
        for group, count in tally.items():
            shares[group] = shares.get(group, 0.0) + weight_at(one.weight, step) * count / sum(tally.values())
    return dict(sorted(shares.items()))


def _steps(sets: tuple[FeedSet, ...]) -> list[int]:
    return sorted({0, *(step for one in sets if isinstance(one.weight, tuple) for step, _ in one.weight)})


def _row_filter(where: WhereSettings) -> RowFilter:
    return RowFilter(**where.model_dump())


def _label_weights(settings: LabelWeightSettings) -> LabelWeights:
    return LabelWeights(entropy=settings.entropy, label_logprob=settings.label_logprob)
