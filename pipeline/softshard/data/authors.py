"""Authors of what is trained on: how much of the text is each one's, and how much of the loss.

In: target sets, or counts of a corpus that has no targets yet, and what is known of who wrote each source. Out: shares
by author. They are two, and the cap holds for both: text of little weight can still be learnt by heart, and weights can
make little text the most of what is learnt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softshard.data.filters import RowFilter
from softshard.data.groups import passing_tables
from softshard.data.mixing import LabelWeights
from softshard.data.target_set import TargetSet
from softshard.errors import FilterMatchesNothing

__all__ = [
    "AuthorShares",
    "Credit",
    "ExtraText",
    "LargestShare",
    "author_shares",
    "author_shares_from_rows",
    "largest_shares",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What is known of who wrote the text of one source. Of a source of which nothing is known, every group counts."""

    named: bool = True
    """Whether its groups are authors; else all of it has the source's name, and nobody is counted."""
    consent: frozenset[str] = frozenset()
    """Authors who agreed."""

    def author(self, group: str) -> str | None:
        """Who is counted for the writing of a group; None: nobody."""
        return group if self.named and group not in self.consent else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorShares:
    """Shares of one set's labels by author; under None those that count as nobody's."""

    text: dict[str | None, float]
    """Each label once; they sum to 1."""
    loss: dict[str | None, float]
    """Each label by its weight, over the sum of these weights without those of groups: by that a step is divided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraText:
    """Text of its own that every step takes beside the sets."""

    shares: AuthorShares
    text: float
    """Its tokens over those of the sets."""
    loss: float
    """Weight of its loss; that of the sets is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestShare:
    """The most that one author has, and of what."""

    share: float
    of: str


def author_shares_from_rows(rows: Iterable[tuple[str | None, float, float, float]]) -> AuthorShares:
    """Shares from rows of (author, labels, their weights, their weights times that of the group); at least one label.

    Where no label has a weight there is no loss, and nobody's share of it.
    """
    text, loss, plain = defaultdict[str | None, float](float), defaultdict[str | None, float](float), 0.0
    for author, labels, weights, weighed in rows:
        text[author] += labels
        loss[author] += weighed
        plain += weights
    total = sum(text.values())
    return AuthorShares(
        text={author: count / total for author, count in text.items()},
        loss={author: weight / (plain or 1.0) for author, weight in loss.items()},
    )


def author_shares(
    sets: Sequence[TargetSet], shares: Sequence[float], *, credited: Mapping[str, Credit], weights: LabelWeights
) -> AuthorShares:
    """Shares of the rows of a set that pass its filter; of several that are blended, of the first one's.

    Args:
        sets: one, or those of a blend, whose weights of labels are averaged.
        shares: of each set in the blend.
        credited: of the first one's sources, by name.
        weights: of labels in the loss.

    Raises:
        FilterMatchesNothing: no row does.
        BalanceImpossible: a row is of a group without a weight.
        PartCorrupt: a part is missing or unreadable.
    """
    first, *others = sets
    joined = weights.are_given and bool(others)
    rows = _rows(first, weights, with_names=joined)
    means = rows.weights
    if joined:
        means = shares[0] * means
        for other, share in zip(others, shares[1:], strict=True):
            found = _rows(_whole(other), weights, with_names=True)
            by_name = np.argsort(found.names)
            # A sequence that the other set lacks is found when the data is read, and named there.
            places = np.searchsorted(found.names, rows.names, sorter=by_name).clip(max=len(by_name) - 1)
            means = means + share * found.weights[by_name[places]]
    authors = [credited.get(source, Credit()).author(group) for group, source in rows.writers]
    columns = (rows.labels.tolist(), means.tolist(), (means * rows.factors).tolist())
    return author_shares_from_rows(zip(authors, *columns, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows of a target set that pass its filter."""

    writers: list[tuple[str, str]]
    """Group and source of each."""
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]
    """Of its labels, summed."""
    factors: NDArray[np.float32]
    """Of its group."""
    names: NDArray[np.bytes_]
    """Sequence ids, where they were asked for; else empty."""


def _whole(targets: TargetSet) -> TargetSet:
    """The set as a blend takes it when it is not the first."""
    return TargetSet(store=targets.store, manifest=targets.manifest, split=targets.split, where=RowFilter())


def _rows(targets: TargetSet, weights: LabelWeights, *, with_names: bool) -> _Rows:
    columns = ["group", "source", "entropy", *(["label_logprob"] if weights.are_given else [])]
    columns += [*(["sequence_id"] if with_names else []), *([targets.groups.column] if targets.groups else [])]
    writers, counts, sums, factors, names = list[tuple[str, str]](), [], [], [], []
    for uri, table in passing_tables(targets, columns):
        labels = table["entropy"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        writers += zip(table["group"].to_pylist(), table["source"].to_pylist(), strict=True)
        counts.append(labels)
        sums.append(_summed(table, labels, weights))
        ones = np.ones(len(labels), dtype=np.float32)
        factors.append(ones if targets.groups is None else targets.groups.of(table, uri=uri))
        names.append(np.array(table["sequence_id"].to_pylist() if with_names else [], dtype="S32"))
    if not writers:
        raise FilterMatchesNothing(uri=targets.store.uri, split=targets.split, where=str(targets.where))
    return _Rows(
        writers=writers,
        labels=np.concatenate(counts),
        weights=np.concatenate(sums),
        factors=np.concatenate(factors),
        names=np.concatenate(names),
    )


def _summed(table: pa.Table, labels: NDArray[np.int64], weights: LabelWeights) -> NDArray[np.float64]:
    """[R] weights of each row's labels, summed."""
    if not weights.are_given:
        return labels.astype(np.float64)
    scores = {name: table[name].combine_chunks().flatten().to_numpy() for name in ("entropy", "label_logprob")}
    rows = np.repeat(np.arange(len(labels)), labels)
    return np.bincount(rows, weights=weights(**scores), minlength=len(labels)).astype(np.float64)


def largest_shares(
    sets: Sequence[AuthorShares], weights: Iterable[Sequence[float]], *, asides: Sequence[ExtraText] = ()
) -> dict[str, LargestShare]:
    """The most of any mixture that each author has, by name.

    Args:
        sets: that are mixed.
        weights: of the sets, at every step that could be the worst.
        asides: what the trainings take beside them, each of them one; the mixture alone counts too.
    """
    most: dict[str, LargestShare] = {}

    def see(shares: Mapping[str | None, float], of: str) -> None:
        for author, share in shares.items():
            if author is not None and (author not in most or share > most[author].share):
                most[author] = LargestShare(share=share, of=of)

    for at in weights:
        text, loss = _mean([one.text for one in sets], at), _mean([one.loss for one in sets], at)
        see(text, "the train tokens")
        see(loss, "their weight in the loss")
        for aside in asides:
            see(_mean([text, aside.shares.text], (1, aside.text)), "the train tokens, retention text included,")
            see(_mean([loss, aside.shares.loss], (1, aside.loss)), "the loss, that on retention text included,")
    return dict(sorted(most.items()))


def _mean(shares: Sequence[Mapping[str | None, float]], weights: Sequence[float]) -> dict[str | None, float]:
    """Their weighted sum, scaled to sum to 1."""
    summed: dict[str | None, float] = {}
    for one, weight in zip(shares, weights, strict=True):
        for author, share in one.items():
            summed[author] = summed.get(author, 0.0) + weight * share
    total = sum(summed.values())
    return {author: share / total for author, share in summed.items()} if total else {}
