"""Counts the files of a source that are not read, so that none of them is passed over in silence."""

from __future__ import annotations

from collections import Counter
from typing import Literal

__all__ = ["EXPECTED", "NotRead"]

EXPECTED = ("README or LICENSE", "_*", "empty")
"""Kinds of files that are not read on purpose; all others are known by their endings."""


class NotRead:
    """Files by kind, and the first of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, uri: str) -> None:
        """Count a file."""
        self._counts[kind] += 1
        # A file name may hold a newline, and bytes that are not UTF-8.
        self._first.setdefault(kind, " ".join(uri.encode(errors="backslashreplace").decode().split()))

    @property
    def num_files(self) -> int:
        """How many there are."""
        return self._counts.total()

    @property
    def kinds(self) -> dict[str, int]:
        """Number of files by kind: those that nobody expects first, then the most frequent."""
        return dict(sorted(self._counts.items(), key=lambda item: (item[0] in EXPECTED, -item[1], item[0])))

    @property
    def level(self) -> Literal["info", "warning"]:
        """`warning` where a file is not read although nothing says that it should not be."""
        return "warning" if set(self._counts) - set(EXPECTED) else "info"

    def describe(self) -> str:
        """`5 files not read: 3 .json.gz, 2 .csv (first: a.json.gz)`; empty where all are read."""
        if not self._counts:
            return ""
        kinds = self.kinds
        listed = ", ".join(f"{count:,} {_plural(kind, count)}" for kind, count in kinds.items())
        first = self._first[next(iter(kinds))]
        return f"{self.num_files:,} {_plural('file', self.num_files)} not read: {listed} (first: {first})"


def _plural(noun: str, count: int) -> str:
    return f"{noun}s" if noun in {"file", "folder"} and count != 1 else noun
