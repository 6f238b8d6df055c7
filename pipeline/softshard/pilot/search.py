"""The search for the threshold 1/n that a budget leads to.

In: bytes or angles measured at some whole n, and a goal. Out: at which n to measure next, and the answer once two
neighbours lie on either side of the goal. Bytes rise and angles fall with n, both smoothly, nearly linear in log n.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

__all__ = ["LARGEST_N", "SMALLEST_N", "ThresholdSearch"]

SMALLEST_N, LARGEST_N = 2, 512
"""Limits of the search."""


class ThresholdSearch:
    """Two n: all that were measured up to `low` are short of the goal, `high` has reached it.

    The goal is to exceed so many bytes (`rising`), or to come down to an angle. Where no n was measured on that side,
    `low` or `high` lies just beyond the limits.
    """

    def __init__(self, values: Mapping[int, float], *, goal: float, rising: bool) -> None:
        reached = [n for n, value in values.items() if (value > goal if rising else value <= goal)]
        self.high = min(reached, default=LARGEST_N + 1)
        self.low = max((n for n in values if n < self.high), default=SMALLEST_N - 1)
        self._values, self._goal, self._rising = values, goal, rising

    @property
    def wanted(self) -> list[int]:
        """Where to measure next, inside the bracket; nowhere once it is closed.

        Between two that were measured, around the place where a line in log n meets the goal; beyond them, at a few n
        with equal quotients.
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
        """The largest n within the bytes, or the smallest within the angle; None where no n is. It must be closed."""
        n = self.low if self._rising else self.high
        return n if SMALLEST_N <= n <= LARGEST_N else None
