"""The search for the threshold 1/n of a budget.

Reads bytes or angles measured at some integers n, and a goal. Gives the n to measure next, and the answer once two
adjacent n lie on either side of the goal. Bytes rise and angles fall with n,
both smoothly and nearly linearly in log n.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

__all__ = ["LARGEST_N", "SMALLEST_N", "ThresholdSearch"]

SMALLEST_N, LARGEST_N = 2, 512
"""Smallest and largest n of the search."""


class ThresholdSearch:
    """An interval from `low`, the largest n that is short of the goal, to `high`, the smallest n that reaches it.

    The goal is to exceed a number of bytes (`rising`), or to come down to an angle. Where no measured n lies on one
    side of it, `low` or `high` is just outside the limits.
    """

    def __init__(self, values: Mapping[int, float], *, goal: float, rising: bool) -> None:
        reached = [n for n, value in values.items() if (value > goal if rising else value <= goal)]
        self.high = min(reached, default=LARGEST_N + 1)
        self.low = max((n for n in values if n < self.high), default=SMALLEST_N - 1)
        self._values, self._goal, self._rising = values, goal, rising

    @property
    def wanted(self) -> list[int]:
        """The n to measure next, inside the interval; empty once `low` and `high` are adjacent.

        Between two measured n: those around the point where a line in log n meets the goal. Outside the measured n: a
        few in geometric progression.
        """
        low, high, values = self.low, self.high, self._values
        if low in values and high in values:
            share = (self._goal - values[low]) / (values[high] - values[low])
            guess = floor(low * (high / low) ** share)
            tried = [guess - 1, guess, guess + 1, guess + 2]
        else:
            first, last = max(low, SMALLEST_N), min(high, LARGEST_N)
            tried = [round(first * (last / first) ** (step / 4)) for step in range(5)]
        return sorted({n for n in tried if low < n < high})

    @property
    def found(self) -> int | None:
        """The largest n within the bytes, or the smallest within the angle; None where there is none.

        Valid once nothing is `wanted`.
        """
        n = self.low if self._rising else self.high
        return n if SMALLEST_N <= n <= LARGEST_N else None
