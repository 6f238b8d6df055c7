"""Which sequences of a split to train on, and their factors in the loss, by the columns with one value per sequence.

In: a row group's statistics, or its small columns. Out: whether any row can pass, which rows pass, and their factors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softshard.errors import BalanceImpossible

__all__ = ["GroupWeights", "RowFilter"]

_Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFilter:
    """Conditions that must all hold; None: no condition."""

    source: tuple[str, ...] | None = None
    style: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    fold: tuple[int, ...] | None = None
    mean_entropy: _Range | None = None
    """Minimum and maximum, in nats, inclusive."""
    mean_label_logprob: _Range | None = None
    """Minimum and maximum, in nats, inclusive."""

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that are set, by column."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def may_pass(self, group: Any) -> bool:
        """Whether a row of a row group can pass, by the statistics in pyarrow's metadata of it."""
        columns = (group.column(index) for index in range(group.num_columns))
        statistics = {column.path_in_schema: column.statistics for column in columns}
        return all(
            _overlaps(name, wanted, statistics[name].min, statistics[name].max)
            for name, wanted in self.conditions.items()
            if statistics[name] is not None and statistics[name].has_min_max
        )

    def passes(self, table: pa.Table) -> NDArray[np.bool_]:
        """[R] which rows of a table pass; it must have the columns of all conditions."""
        passing = np.ones(table.num_rows, dtype=np.bool_)
        for name, wanted in self.conditions.items():
            column = table[name]
            if _is_range(name):
                holds = pc.and_(pc.greater_equal(column, wanted[0]), pc.less_equal(column, wanted[1]))
            else:
                holds = pc.is_in(column, value_set=pa.array(wanted, column.type))
            passing &= holds.to_numpy()
        return passing

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.conditions.items()) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWeights:
    """A factor for the weights of a sequence's labels, by the value of one plain column."""

    column: str
    weights: dict[str, float]
    """By the column's value as text; every value that occurs must have one."""

    def of(self, table: pa.Table, *, uri: str) -> NDArray[np.float32]:
        """[R] factors of a table's rows.

        Raises:
            BalanceImpossible: a row has a group without a weight.
        """
        column = table[self.column].combine_chunks().dictionary_encode()
        values = [str(value) for value in column.dictionary.to_pylist()]
        if missing := [value for value in values if value not in self.weights]:
            raise BalanceImpossible(column=self.column, problem=f"group {missing[0]!r} of {uri} has no weight")
        weights = np.array([self.weights[value] for value in values], dtype=np.float32)
        factors: NDArray[np.float32] = weights[column.indices.to_numpy(zero_copy_only=False)]
        return factors

    def digest_parts(self) -> dict[str, Any]:
        """The settings as plain values, for a digest."""
        return asdict(self)


def _is_range(name: str) -> bool:
    return name.startswith("mean_")


def _overlaps(name: str, wanted: Any, least: Any, most: Any) -> bool:
    if _is_range(name):
        return bool(wanted[0] <= most and least <= wanted[1])
    return any(least <= value <= most for value in wanted)
