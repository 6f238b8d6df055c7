"""The author cap: without consent, no author's writing may be a larger share of the training data than the job allows.

It is checked twice: on the corpus, before a teacher is trained, as far as the shares are known by then, and on the
training data, before the student is trained. A failed check raises an error that names an author.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softshard.config import (
    BalanceSettings,
    Job,
    LabelWeightSettings,
    RetentionSettings,
    TrainSettings,
    WhereSettings,
    weight_at,
)
from softshard.corpus.build import count_corpus
from softshard.corpus.counts import GroupCount
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
from softshard.stages.corpus.stage import Corpora, StoredCorpus, naming_retention, retention_settings
from softshard.stages.train.data import TrainingData, make_label_weights, make_row_filter, other_sets, source_credits
from softshard.storage import open_store
from softshard.telemetry import Reporter

__all__ = ["CountedAuthors", "CountedText", "check_author_cap", "check_corpora", "count_authors", "expected_shares"]

_COUNTED = ("source", "style", "group")
"""Filters that counts by group can apply; the others need targets."""
_ROUNDING = 1e-6
"""Weights of groups are float32: an author whom a balance brings to the cap is not above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedText:
    """The text that a job would train on, counted by group, before there are targets."""

    style: tuple[GroupCount, ...]
    retention: tuple[GroupCount, ...]
    """Empty where no training learns the tokens of the retention text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAuthors:
    """The authors who count against the cap."""

    counted: int
    largest_share: float | None
    """Of the training data; None where no author counts."""
    cap: float
    refusal: str | None
    """The error that would end the run; None where there is none."""


def _trains_on_retention_text(settings: TrainSettings) -> bool:
    """Whether some training of the job learns the tokens of the retention text, and not the base's distribution."""
    retention = settings.retention
    return retention is not None and retention.objective == "ce" and bool(_retention_weights(settings, retention))


def _retention_weights(settings: TrainSettings, retention: RetentionSettings) -> set[float]:
    swept = settings.sweep.retention_weight if settings.sweep is not None else ()
    baseline = () if settings.baseline is None else (settings.baseline.retention_weight,)
    return {weight for weight in (*(swept or (retention.weight,)), *baseline) if weight > 0}


def _refuse_above(shares: dict[str, LargestShare], *, cap: float) -> None:
    """Raise AuthorDominates for the author with the largest share, where it is above the cap."""
    for author, largest in sorted(shares.items(), key=lambda item: (-item[1].share, item[0])):
        if largest.share > cap + _ROUNDING:
            raise AuthorDominates(author=author, share=largest.share, cap=cap, of=largest.of)


def check_corpora(workspace: Workspace, corpora: Corpora) -> None:
    """Refuse a corpus on which the job could not be trained, as far as that is known without targets.

    Raises:
        AuthorDominates: one author's writing is a larger share of it than the job allows.
        FilterMatchesNothing, BalanceImpossible: as in `expected_shares`.
    """
    style, retention = corpora.style, corpora.retention
    with_retention = retention is not None and _trains_on_retention_text(workspace.job.train)
    text = CountedText(
        style=style.train_groups(),
        retention=retention.train_groups() if retention is not None and with_retention else (),
    )
    _refuse_above(expected_shares(workspace, text) or {}, cap=workspace.job.train.author_cap)


def expected_shares(workspace: Workspace, text: CountedText) -> dict[str, LargestShare] | None:
    """The least share that each author will have, by name; None where it is not known before there are targets.

    It is unknown with a filter on means of targets, where another job's targets are missing, and where the job's own
    targets are left out. Label weights are not known yet; of a mix the first step counts, and each label counts once.

    Raises:
        FilterMatchesNothing: no text of the corpus passes `train.where`.
        BalanceImpossible: its groups cannot have their shares.
    """
    settings, more = workspace.job.train, workspace.job.train.targets
    alone = more is None or (more.how == "blend" and more.own_weight != 0)
    mixed = more is not None and more.how == "mix"
    if set(settings.where.model_dump(exclude_none=True)) - set(_COUNTED) or not (alone or mixed):
        return None
    counts = _filtered(text.style, settings.where, uri=workspace.corpus.uri)
    knows_weights = more is None and settings.label_weights == LabelWeightSettings()
    factors = _factors(counts, settings.balance if knows_weights else None)
    sets = [_counted_shares(counts, source_credits(workspace.job.corpus.sources), factors)]
    weights = [1.0]
    if more is not None and more.how == "mix":
        try:
            others = other_sets(settings)
        except ManifestMissing:
            return None
        sets += [author_shares([o.targets], [1.0], credited=o.credited, weights=LabelWeights()) for o in others]
        weights = [weight_at(weight, 0) for weight in (more.own_weight, *(other.weight for other in others))]
    return largest_shares(sets, [weights], asides=_retention_shares(settings, text.retention))


def count_authors(
    job: Job, tokenizer: Tokenizer, style: tuple[GroupCount, ...], reporter: Reporter
) -> CountedAuthors | None:
    """`expected_shares` of a job that has not run, summarised, from the counts of its corpus; None where unknown.

    Reads and counts the retention text too. Raises as `expected_shares` and `count_corpus`.
    """
    workspace = Workspace(job=job, out=open_store(job.out))
    settings, retention = retention_settings(job), tuple[GroupCount, ...]()
    if settings is not None:
        with naming_retention():
            count = count_corpus(settings=settings, tokenizer=tokenizer, folds=0, seed=job.seed, reporter=reporter)
        retention = count.groups if _trains_on_retention_text(job.train) else ()
    shares = expected_shares(workspace, CountedText(style=style, retention=retention))
    if shares is None:
        return None
    cap, refusal = job.train.author_cap, None
    try:
        _refuse_above(shares, cap=cap)
    except AuthorDominates as error:
        refusal = str(error)
    largest = max((each.share for each in shares.values()), default=None)
    return CountedAuthors(counted=len(shares), largest_share=largest, cap=cap, refusal=refusal)


def _filtered(counts: Sequence[GroupCount], where: WhereSettings, *, uri: str) -> list[GroupCount]:
    """The counts that pass the filters on source, style and group."""
    wanted = {name: getattr(where, name) for name in _COUNTED}
    found = [
        count
        for count in counts
        if all(names is None or getattr(count, name) in names for name, names in wanted.items())
    ]
    if not found:
        raise FilterMatchesNothing(uri=uri, split="train", where=str(make_row_filter(where)))
    return found


def _factors(counts: Sequence[GroupCount], settings: BalanceSettings | None) -> list[float]:
    """The weight of each count under a balance; 1 for a balance by document, since documents are not counted here."""
    if settings is None or settings.column == "document_id":
        return [1.0] * len(counts)
    names = [str(getattr(count, settings.column)) for count in counts]
    tally: Tally = {}
    for name, count in sorted(zip(names, counts, strict=True)):
        tally[name] = tally.get(name, 0.0) + count.num_labels
    balance = balanced(tally, column=settings.column, shares=settings.shares, clip=settings.clip)
    return [balance.weights.weights[name] for name in names]


def _counted_shares(
    counts: Sequence[GroupCount], credited: Mapping[str, Credit], factors: Sequence[float]
) -> AuthorShares:
    return author_shares_from_rows(
        (credited[count.source].author(count.group), count.num_labels, count.num_labels, count.num_labels * factor)
        for count, factor in zip(counts, factors, strict=True)
    )


def _retention_shares(settings: TrainSettings, counts: Sequence[GroupCount]) -> list[ExtraText]:
    """The retention text, once for each weight that some training gives it; empty where no training learns it.

    Its share of a step's tokens is that of its batch, its share of the loss that of its weight.
    """
    retention = settings.retention
    if retention is None or not counts:
        return []
    shares = _counted_shares(counts, source_credits(retention.sources), [1.0] * len(counts))
    tokens = retention.batch_tokens / settings.optimizer.batch_tokens
    return [
        ExtraText(shares=shares, text=tokens, loss=weight) for weight in sorted(_retention_weights(settings, retention))
    ]


def check_author_cap(workspace: Workspace, data: TrainingData, retention: StoredCorpus | None) -> Tally:
    """The largest share of each author in the training data, by name; where weights change, over all steps.

    It is the larger of two shares: that of the training tokens, which are the labels of the sequences that pass the
    filters, each counted once; and that of their weight in the loss. Writing under consent, and writing from sources
    that name no authors, counts in the total and in no author's share.

    Raises:
        AuthorDominates: one author has more than the job's cap.
        FilterMatchesNothing, BalanceImpossible, PartCorrupt: of the sets.
    """
    settings = workspace.job.train
    weights = make_label_weights(settings.label_weights)
    if data.how == "blend":
        targets = [each.targets for each in data.sets]
        blend = Blend(sets=tuple(targets), weights=data.weights(0))
        sets = [author_shares(targets, blend.shares, credited=data.sets[0].credited, weights=weights)]
        mixtures: list[tuple[float, ...]] = [(1.0,)]
    else:
        sets = [author_shares([each.targets], [1.0], credited=each.credited, weights=weights) for each in data.sets]
        mixtures = [data.weights(step) for step in _steps(data, settings, seed=workspace.job.seed)]
    with_retention = retention is not None and _trains_on_retention_text(settings)
    counts = retention.train_groups() if retention is not None and with_retention else ()
    shares = largest_shares(sets, mixtures, asides=_retention_shares(settings, counts))
    _refuse_above(shares, cap=settings.author_cap)
    return {author: largest.share for author, largest in shares.items()}


def _steps(data: TrainingData, settings: TrainSettings, *, seed: int) -> list[int]:
    """Steps at which an author's share can be largest: between changes of the weights it is monotonic."""
    if data.steps == [0]:
        return [0]
    # Alpha does not change the size of a batch; with alpha 1 no kind of target is refused.
    dataset = data.dataset(settings, alpha=1.0, optimizer=settings.optimizer, seed=seed)
    last = num_steps(dataset, optimizer=settings.optimizer) - 1
    return [step for step in data.steps if step < last] + [last]
