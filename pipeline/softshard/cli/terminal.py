"""Text that a model or a corpus wrote, made fit for a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable

__all__ = ["WIDTH", "packed", "printable", "wrapped"]

WIDTH = 80
"""Columns."""


def printable(text: str) -> str:
    """The text with every control, format or unassigned character but the newline as `·`, so that none is obeyed."""
    return "".join("·" if unicodedata.category(one)[0] == "C" and one != "\n" else one for one in text)


def wrapped(text: str, *, indent: int = 0) -> list[str]:
    """Lines of at most 80 columns, its own line breaks kept, all indented."""
    margin = " " * indent
    return [
        margin + row
        for line in printable(text).splitlines()
        for row in (textwrap.wrap(line, WIDTH - indent, break_on_hyphens=False) or [""])
    ]


def packed(items: Iterable[str], *, indent: int) -> list[str]:
    """Lines of at most 80 columns with the items in order, two spaces apart; none is broken, a longer one is cut."""
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
    return [" " * indent + one for one in (*lines, line) if one]
