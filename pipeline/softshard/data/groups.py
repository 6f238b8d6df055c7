"""Groups of a target set's sequences: how much of the text each has, and weights that change their shares of the loss.

In: a target set and one of its plain columns (author, source, style, ...). Out: labels of each group, and a weight for
each that brings its share of the loss to a given one, as far as the clipping lets it. Small columns alone are read.
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
"""Labels of each group, or its share of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShare:
    """One group before and after it is weighed."""

    group: str
    share_before: float
    """Of the labels."""
    share_wanted: float
    weight: float
    clipped: bool
    """Whether the weight that the wanted share needs lies outside the range."""
    share_after: float
    """Of the summed weights of labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Weights of groups towards given shares, and how near they come."""

    column: str
    clip: tuple[float, float]
    groups: tuple[GroupShare, ...]
    """By name."""

    @property
    def weights(self) -> GroupWeights:
        """What a target set takes: the weights over their mean, so that they leave the size of the loss as it is."""
        mean = sum(one.weight * one.share_before for one in self.groups)
        return GroupWeights(column=self.column, weights={one.group: one.weight / mean for one in self.groups})


def tally_groups(targets: TargetSet, column: str) -> Tally:
    """Labels of each group among the sequences that pass the set's filter, by name.

    Raises:
        FilterMatchesNothing: there is none.
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
    """Of each part: where it lies, and some columns of the rows that pass the set's filter. Raises PartCorrupt."""
    where = targets.where
    names = list(dict.fromkeys([*columns, *where.conditions]))
    for receipt in targets.manifest.of_split(targets.split):
        table = read_columns(targets.store, receipt, names)
        yield f"{targets.store.uri}/{receipt.path}", table.filter(pa.array(where.passes(table)))


def balanced(
    tally: Tally, *, column: str, shares: Mapping[str, float] | Literal["equal"], clip: tuple[float, float]
) -> Balance:
    """The weight wanted share / share of each group, clipped.

    Groups that `shares` does not name have what it leaves, each in proportion to its labels.

    Raises:
        BalanceImpossible: a named group has no label, or the shares leave nothing, or something, for no group.
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
