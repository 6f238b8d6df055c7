"""Groups of a target set's sequences: their shares of the text, and weights that change their shares of the loss.

In: a target set and one of its plain columns (author, source, style, ...). Out: the labels of each group, and a weight
for each group that brings its share of the loss to a given value, as far as the clipping allows. Only small columns are
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from softshard.data.filters import GroupWeights
from softshard.data.target_set import TargetSet
from softshard.errors import BalanceImpossible, FilterMatchesNothing
from softshard.shard.read import read_columns

__all__ = ["Balance", "GroupShare", "Tally", "balanced", "passing_tables", "tally_groups"]

_NAMED = 5

Tally = dict[str, float]
"""Number of labels of each group, or its share of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShare:
    """One group before and after weighting."""

    group: str
    share_before: float
    """Of the number of labels."""
    share_wanted: float
    weight: float
    clipped: bool
    """Whether the weight that gives the wanted share is outside the clipping range."""
    share_after: float
    """Of the sum of the weights of labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Weights of groups for given shares of the loss, and the shares that they give."""

    column: str
    clip: tuple[float, float]
    groups: tuple[GroupShare, ...]
    """By name."""

    @property
    def weights(self) -> GroupWeights:
        """For a target set: the weights divided by their mean, which leaves the size of the loss unchanged."""
        mean = sum(share.weight * share.share_before for share in self.groups)
        return GroupWeights(column=self.column, weights={share.group: share.weight / mean for share in self.groups})


def tally_groups(targets: TargetSet, column: str) -> Tally:
    """Number of labels of each group among the sequences that pass the set's filter, by name.

    Raises:
        FilterMatchesNothing: no sequence passes.
        PartCorrupt: a part is missing or unreadable.
    """
    counts: Counter[str] = Counter()
    for _, table in passing_tables(targets, [column, "entropy"]):
        labels = table["entropy"].combine_chunks().value_lengths().to_pylist()
        for value, count in zip(table[column].to_pylist(), labels, strict=True):
            counts[str(value)] += count
    if not counts:
        raise FilterMatchesNothing(uri=targets.store.uri, split=targets.split, where=str(targets.where))
    return dict(sorted(counts.items()))


def passing_tables(targets: TargetSet, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """The URI of each part, and some columns of its rows that pass the set's filter. Raises PartCorrupt."""
    where = targets.where
    names = list(dict.fromkeys([*columns, *where.conditions]))
    for receipt in targets.manifest.of_split(targets.split):
        table = read_columns(targets.store, receipt, names)
        yield f"{targets.store.uri}/{receipt.path}", table.filter(pa.array(where.passes(table)))


def balanced(
    tally: Tally, *, column: str, shares: Mapping[str, float] | Literal["equal"], clip: tuple[float, float]
) -> Balance:
    """The weight of each group, wanted share / share of the labels, clipped.

    Groups that `shares` does not name get the rest, in proportion to their labels.

    Raises:
        BalanceImpossible: a named group has no label, or the shares do not sum to 1 and no other group is left.
    """
    total = sum(tally.values())
    wanted = _wanted(tally, column, dict.fromkeys(tally, 1 / len(tally)) if shares == "equal" else shares)
    needed = {group: wanted[group] * total / count for group, count in tally.items()}
    weights = {group: min(max(weight, clip[0]), clip[1]) for group, weight in needed.items()}
    after = sum(weights[group] * count for group, count in tally.items())
    groups = tuple(
        GroupShare(
            group=group,
            share_before=count / total,
            share_wanted=wanted[group],
            weight=weights[group],
            clipped=weights[group] != needed[group],
            share_after=weights[group] * count / after,
        )
        for group, count in sorted(tally.items())
    )
    return Balance(column=column, clip=clip, groups=groups)


def _wanted(tally: Tally, column: str, shares: Mapping[str, float]) -> dict[str, float]:
    if absent := sorted(set(shares) - set(tally)):
        there = ", ".join(map(repr, list(tally)[:_NAMED])) + (", ..." if len(tally) > _NAMED else "")
        raise BalanceImpossible(column=column, problem=f"no train sequence is of group {absent[0]!r}, but of {there}")
    others = sum(count for group, count in tally.items() if group not in shares)
    left = 1 - sum(shares.values())
    if abs(left) < 1e-9:
        left = 0.0
    if left > 0 and not others:
        raise BalanceImpossible(column=column, problem=f"the shares sum to {1 - left:g}, and no group is left")
    return {group: shares[group] if group in shares else left * count / others for group, count in tally.items()}
