"""The author cap: nobody's writing may be more of what a job trains on than it allows, without consent.

In: the job, its corpora and, once they are there, its targets. Out: the share of each author, or an error that names
one. It is looked at as soon as there is a corpus, before any teacher is trained on it, as far as can be told then, and
in full before the student is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softshard.config import BalanceSettings, Job, LabelWeightSettings, RetentionSettings, TrainSettings, weight_at
from softshard.corpus.build import count_corpus
from softshard.corpus.counts import GroupCount
from softshard.corpus.documents import train_groups
from softshard.corpus.manifest import CorpusManifest
from softshard.data.authors import (
    AuthorShares,
    Credit,
    ExtraText,
    LargestShare,
    author_shares,
    author_shares_from_rows,
    largest_shares,
)
from softshard.data.blend import Blend
from softshard.data.groups import Tally, balanced
from softshard.data.mixing import LabelWeights
from softshard.errors import AuthorDominates, FilterMatchesNothing, ManifestMissing
from softshard.finetune.loop import num_steps
from softshard.models import Tokenizer
from softshard.output.workspace import Workspace
from softshard.stages.corpus.stage import Corpora, retention_settings
from softshard.stages.train.data import TrainingData, make_label_weights, make_row_filter, other_sets, source_credits
from softshard.storage import open_store
from softshard.telemetry import Reporter

__all__ = ["CountedAuthors", "CountedText", "check_author_cap", "check_corpora", "count_authors", "expected_shares"]

_COUNTED = ("source", "style", "group")
"""Filters that a count by group can tell; the others are of targets."""
_ROUNDING = 1e-6
"""Weights of groups are float32: an author who is brought to the cap is not above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedText:
    """What a job would train on, by group, before there are targets."""

    style: tuple[GroupCount, ...]
    retention: tuple[GroupCount, ...]
    """Empty where no training has a loss on the tokens of retention text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAuthors:
    """Authors who are counted against the cap."""

    counted: int
    largest_share: float | None
    """Of what is trained on; None where nobody is counted."""
    cap: float
    refusal: str | None
    """What the run would end with; None where it would not."""


def _trains_on_retention_text(settings: TrainSettings) -> bool:
    """Whether some training of the job learns the tokens of retention text, and not what the base holds of them."""
    retention = settings.retention
    return retention is not None and retention.objective == "ce" and bool(_retention_weights(settings, retention))


def _retention_weights(settings: TrainSettings, retention: RetentionSettings) -> set[float]:
    swept = settings.sweep.retention_weight if settings.sweep is not None else ()
    baseline = () if settings.baseline is None else (settings.baseline.retention_weight,)
    return {weight for weight in (*(swept or (retention.weight,)), *baseline) if weight > 0}


def _refuse_above(shares: dict[str, LargestShare], *, cap: float) -> None:
    """Raise AuthorDominates where an author has more than the cap; of several, the one with the most is named."""
    for author, largest in sorted(shares.items(), key=lambda item: (-item[1].share, item[0])):
        if largest.share > cap + _ROUNDING:
            raise AuthorDominates(author=author, share=largest.share, cap=cap, of=largest.of)


def check_corpora(workspace: Workspace, corpora: Corpora) -> None:
    """Refuse a corpus of which the job could not be trained, as far as can be told without targets.

    Raises:
        AuthorDominates: one author's writing is more of it than the job allows.
        FilterMatchesNothing, BalanceImpossible: as in `expected_shares`.
    """
    style, retention = corpora.style, corpora.retention
    with_retention = retention is not None and _trains_on_retention_text(workspace.job.train)
    text = CountedText(
        style=train_groups(workspace.corpus, style.documents),
        retention=train_groups(workspace.retention, retention.documents) if retention and with_retention else (),
    )
    _refuse_above(expected_shares(workspace, text) or {}, cap=workspace.job.train.author_cap)


def expected_shares(workspace: Workspace, text: CountedText) -> dict[str, LargestShare] | None:
    """The least that each author will have, by name; None where that cannot be told before there are targets.

    A filter on means of targets, another job's targets that are not there, and this job's being left out, let nothing
    be told. Weights of labels are not known yet; of a mix the first step is looked at, and each label counts once.

    Raises:
        FilterMatchesNothing: no text of the corpus passes `train.where`.
        BalanceImpossible: its groups cannot have their shares.
    """
    settings, more = workspace.job.train, workspace.job.train.targets
    alone = more is None or (more.how == "blend" and more.own_weight != 0)
    mixed = more is not None and more.how == "mix"
    if set(settings.where.model_dump(exclude_none=True)) - set(_COUNTED) or not (alone or mixed):
        return None
    counts = _passing(workspace, text.style)
    knows_weights = more is None and settings.label_weights == LabelWeightSettings()
    factors = _factors(counts, settings.balance if knows_weights else None)
    sets = [_counted_shares(counts, source_credits(workspace.job.corpus.sources), factors)]
    weights = [1.0]
    if more is not None and more.how == "mix":
        try:
            others = other_sets(workspace)
        except ManifestMissing:
            return None
        sets += [author_shares([one.targets], [1.0], credited=one.credited, weights=LabelWeights()) for one in others]
        weights = [weight_at(weight, 0) for weight in (more.own_weight, *(one.weight for one in others))]
    return largest_shares(sets, [weights], asides=_asides(workspace, text.retention))


def count_authors(
    job: Job, tokenizer: Tokenizer, style: tuple[GroupCount, ...], reporter: Reporter
) -> CountedAuthors | None:
    """What `expected_shares` tells of a job that has not run, from the counts of its corpus; None where it is nothing.

    Retention text that is trained on is read and counted for it. Raises what `expected_shares` and `count_corpus` do.
    """
    workspace = Workspace(job=job, out=open_store(job.out))
    settings, retention = retention_settings(workspace), tuple[GroupCount, ...]()
    if settings is not None and _trains_on_retention_text(job.train):
        count = count_corpus(settings=settings, tokenizer=tokenizer, folds=0, seed=job.seed, reporter=reporter)
        retention = count.groups
    shares = expected_shares(workspace, CountedText(style=style, retention=retention))
    if shares is None:
        return None
    cap, refusal = job.train.author_cap, None
    try:
        _refuse_above(shares, cap=cap)
    except AuthorDominates as error:
        refusal = str(error)
    largest = max((one.share for one in shares.values()), default=None)
    return CountedAuthors(counted=len(shares), largest_share=largest, cap=cap, refusal=refusal)


def _passing(workspace: Workspace, counts: Sequence[GroupCount]) -> list[GroupCount]:
    where = workspace.job.train.where
    wanted = {name: getattr(where, name) for name in _COUNTED}
    found = [
        one for one in counts if all(names is None or getattr(one, name) in names for name, names in wanted.items())
    ]
    if not found:
        raise FilterMatchesNothing(uri=workspace.corpus.uri, split="train", where=str(make_row_filter(where)))
    return found


def _factors(counts: Sequence[GroupCount], asked: BalanceSettings | None) -> list[float]:
    """Of each count; a document is not counted by itself, so that a balance by document is not known here."""
    if asked is None or asked.column == "document_id":
        return [1.0] * len(counts)
    names = [str(getattr(one, asked.column)) for one in counts]
    tally: Tally = {}
    for name, one in sorted(zip(names, counts, strict=True)):
        tally[name] = tally.get(name, 0.0) + one.num_labels
    balance = balanced(tally, column=asked.column, shares=asked.shares, clip=asked.clip)
    return [balance.weights.weights[name] for name in names]


def _counted_shares(
    counts: Sequence[GroupCount], credited: Mapping[str, Credit], factors: Sequence[float]
) -> AuthorShares:
    return author_shares_from_rows(
        (credited[one.source].author(one.group), one.num_labels, one.num_labels, one.num_labels * factor)
        for one, factor in zip(counts, factors, strict=True)
    )


def _asides(workspace: Workspace, counts: Sequence[GroupCount]) -> list[ExtraText]:
    """The retention text beside the sets, once for each weight that some training gives it; none where none learns it.

    Of a step's tokens it has the share of its batch, of its loss that of its weight.
    """
    settings = workspace.job.train
    retention = settings.retention
    if retention is None or not counts:
        return []
    shares = _counted_shares(counts, source_credits(retention.sources), [1.0] * len(counts))
    tokens = retention.batch_tokens / settings.optimizer.batch_tokens
    return [
        ExtraText(shares=shares, text=tokens, loss=weight) for weight in sorted(_retention_weights(settings, retention))
    ]


def check_author_cap(workspace: Workspace, feed: TrainingData, retention: CorpusManifest | None) -> Tally:
    """The most that each author has of what is trained on, by name; where weights change, at any step that is taken.

    It is the larger of two shares: of the train tokens, which are labels of sequences that pass the filters, each once;
    and of the weight of these in the loss. Writing under consent, and of sources that name no authors, has part in the
    sum and in no author's share.

    Raises:
        AuthorDominates: one has more than the job's cap.
        FilterMatchesNothing, BalanceImpossible, PartCorrupt: of the sets.
    """
    weights = make_label_weights(workspace.job.train.label_weights)
    if feed.how == "blend":
        first, targets = feed.sets[0], [one.targets for one in feed.sets]
        blend = Blend(sets=tuple(targets), weights=feed.weights(0))
        sets = [author_shares(targets, blend.shares, credited=first.credited, weights=weights)]
        mixtures: list[tuple[float, ...]] = [(1.0,)]
    else:
        sets = [author_shares([one.targets], [1.0], credited=one.credited, weights=weights) for one in feed.sets]
        mixtures = [feed.weights(step) for step in _steps(workspace, feed)]
    with_retention = retention is not None and _trains_on_retention_text(workspace.job.train)
    counts = train_groups(workspace.retention, retention.documents) if retention and with_retention else ()
    shares = largest_shares(sets, mixtures, asides=_asides(workspace, counts))
    _refuse_above(shares, cap=workspace.job.train.author_cap)
    return {author: largest.share for author, largest in shares.items()}


def _steps(workspace: Workspace, feed: TrainingData) -> list[int]:
    """Steps at which an author's share can be largest: between two turns of the weights it only rises or only falls."""
    if feed.steps == [0]:
        return [0]
    optimizer = workspace.job.train.optimizer
    # Alpha changes no batch's size; with 1, nothing of the targets need be fit to be mixed in.
    last = num_steps(feed.dataset(workspace, alpha=1.0, optimizer=optimizer), optimizer=optimizer) - 1
    return [step for step in feed.steps if step < last] + [last]
