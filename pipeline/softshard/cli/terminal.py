"""Formatting text that a model or a corpus wrote for a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable

__all__ = ["WIDTH", "packed", "printable", "wrapped"]

WIDTH = 80
"""Columns."""


def printable(text: str) -> str:
    """The text with every control, format or unassigned character but the newline replaced by `·`."""
    return "".join("·" if unicodedata.category(char)[0] == "C" and char != "\n" else char for char in text)


def wrapped(text: str, *, indent: int = 0) -> list[str]:
    """The text in lines of at most 80 columns, indented, with its own line breaks kept."""
    margin = " " * indent
    return [
        margin + row
        for line in printable(text).splitlines()
        for row in (textwrap.wrap(line, WIDTH - indent, break_on_hyphens=False) or [""])
    ]


def packed(items: Iterable[str], *, indent: int) -> list[str]:
    """The items in order in lines of at most 80 columns, two spaces apart; no item is split, a long one is cut."""
    lines: list[str] = []
    line = ""
    for item in items:
        shown = (
            textwrap.shorten(printable(item), WIDTH - indent, placeholder="…") if len(item) > WIDTH - indent else item
        )
        if line and indent + len(line) + 2 + len(shown) > WIDTH:
            lines.append(line)
            line = ""
        line = f"{line}  {shown}" if line else shown
    return [" " * indent + each for each in (*lines, line) if each]
