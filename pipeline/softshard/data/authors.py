"""Each author's share of the training text, and of the loss.

In: target sets, or counts of a corpus that has no targets yet, and what is known about the authors of each source. Out:
two shares by author. The cap applies to both: text of low weight can still be memorised, and weights can make a little
text most of what is learnt.
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
    """What is known about the authors of one source. By default every group counts as an author."""

    named: bool = True
    """Whether its groups are authors; if not, its text counts for nobody."""
    consent: frozenset[str] = frozenset()
    """Authors who gave consent."""

    def author(self, group: str) -> str | None:
        """The author that a group's text counts for; None: nobody."""
        return group if self.named and group not in self.consent else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorShares:
    """Shares of one set's labels by author; the key None has the labels that count for nobody."""

    text: dict[str | None, float]
    """Of the number of labels; sums to 1."""
    loss: dict[str | None, float]
    """Sum of the weights of the author's labels, divided by the sum of all weights without the factors of groups, which
    is what the loss of a step is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraText:
    """Text that every step trains on besides the target sets: the retention text."""

    shares: AuthorShares
    text: float
    """Its tokens, divided by those of the sets."""
    loss: float
    """Weight of its loss, where that of the sets is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestShare:
    """The largest share that one author has."""

    share: float
    of: str
    """What it is a share of, for messages."""


def author_shares_from_rows(rows: Iterable[tuple[str | None, float, float, float]]) -> AuthorShares:
    """Shares from rows of (author, labels, sum of their weights, the same times the factor of the group).

    There is at least one label. Where all weights are 0 there is no loss, and all shares of it are 0.
    """
    text, loss, plain = defaultdict[str | None, float](float), defaultdict[str | None, float](float), 0.0
    for author, labels, weights, scaled_weights in rows:
        text[author] += labels
        loss[author] += scaled_weights
        plain += weights
    total = sum(text.values())
    return AuthorShares(
        text={author: count / total for author, count in text.items()},
        loss={author: weight / (plain or 1.0) for author, weight in loss.items()},
    )


def author_shares(
    sets: Sequence[TargetSet], shares: Sequence[float], *, credited: Mapping[str, Credit], weights: LabelWeights
) -> AuthorShares:
    """Shares of the rows of a set that pass its filter; for a blend, of the first set's rows.

    Args:
        sets: one set, or those of a blend, whose label weights are averaged.
        shares: of each set in the blend.
        credited: of the first set's sources, by name.
        weights: of labels in the loss.

    Raises:
        FilterMatchesNothing: no row passes the filter.
        BalanceImpossible: a row has a group without a weight.
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
    """[R] group and source of each row."""
    labels: NDArray[np.int64]
    """[R] number of its labels."""
    weights: NDArray[np.float64]
    """[R] sum of the weights of its labels."""
    factors: NDArray[np.float32]
    """[R] factor of its group."""
    names: NDArray[np.bytes_]
    """[R] sequence ids if requested; else empty."""


def _whole(targets: TargetSet) -> TargetSet:
    """The set without its filter and groups: a blend uses those of its first set."""
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
    """The largest share of each author in any mixture, by name.

    Args:
        sets: the target sets that are mixed.
        weights: of the sets, at every step where a share could be largest.
        asides: extra text of the trainings, one value for each training that has some; the mixture without any also
            counts.
    """
    most: dict[str, LargestShare] = {}

    def note(shares: Mapping[str | None, float], of: str) -> None:
        for author, share in shares.items():
            if author is not None and (author not in most or share > most[author].share):
                most[author] = LargestShare(share=share, of=of)

    for at in weights:
        text, loss = _mean([shares.text for shares in sets], at), _mean([shares.loss for shares in sets], at)
        note(text, "the train tokens")
        note(loss, "their weight in the loss")
        for aside in asides:
            note(_mean([text, aside.shares.text], (1, aside.text)), "the train tokens, retention text included,")
            note(_mean([loss, aside.shares.loss], (1, aside.loss)), "the loss, that on retention text included,")
    return dict(sorted(most.items()))


def _mean(shares: Sequence[Mapping[str | None, float]], weights: Sequence[float]) -> dict[str | None, float]:
    """Their weighted sum, scaled to sum to 1."""
    summed: dict[str | None, float] = {}
    for by_author, weight in zip(shares, weights, strict=True):
        for author, share in by_author.items():
            summed[author] = summed.get(author, 0.0) + weight * share
    total = sum(summed.values())
    return {author: share / total for author, share in summed.items()} if total else {}
