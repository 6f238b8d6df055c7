"""Text that a model or a corpus wrote, made fit for a terminal."""

from __future__ import annotations

import textwrap
import unicodedata

__all__ = ["WIDTH", "printable", "wrapped"]

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
