"""Canonical JSON: equal values give equal bytes. Keys are sorted, text is UTF-8 and not escaped.

Two layouts: indented by one space and ending in a newline, for the records that are stored, and without any whitespace,
for digests. A record with a list that does not fit in memory is written member by member, and the list item by item;
the bytes are those of the record dumped at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from pydantic import BaseModel

__all__ = ["canonical_json", "compact_json", "compact_pieces", "write_canonical_json"]


def canonical_json(record: BaseModel) -> bytes:
    """A record as it is stored: indented, with a newline at the end."""
    return (_dumps(record, indent=1) + "\n").encode()


def compact_json(value: Any) -> str:
    """A value without whitespace. Models inside it are dumped whole.

    Raises:
        TypeError: the value holds something that JSON has no form for.
    """
    return _dumps(value, indent=None)


def write_canonical_json(file: IO[bytes], members: Mapping[str, Any]) -> None:
    """Write a record as `canonical_json` does.

    Args:
        file: open for writing.
        members: plain values by key; an iterator is written as a list, one item at a time.
    """
    for piece in _pieces(members, indent=1):
        file.write(piece.encode())
    file.write(b"\n")


def compact_pieces(members: Mapping[str, Any]) -> Iterator[bytes]:
    """The UTF-8 bytes of `compact_json` in pieces; `members` as in `write_canonical_json`."""
    return (piece.encode() for piece in _pieces(members, indent=None))


def _dumps(value: Any, *, indent: int | None) -> str:
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(value, default=_plain, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no canonical form")


def _pieces(members: Mapping[str, Any], *, indent: int | None) -> Iterator[str]:
    colon = ": " if indent else ":"

    def line(depth: int) -> str:
        return "\n" + " " * (indent * depth) if indent else ""

    def dumps(value: Any, *, depth: int) -> str:
        text = _dumps(value, indent=indent)
        return text.replace("\n", line(depth)) if indent else text

    opening = "{"
    for key in sorted(members):
        yield opening + line(1) + dumps(key, depth=0) + colon
        opening = ","
        if not isinstance(members[key], Iterator):
            yield dumps(members[key], depth=1)
            continue
        bracket = "["
        for item in members[key]:
            yield bracket + line(2) + dumps(item, depth=2)
            bracket = ","
        yield "[]" if bracket == "[" else line(1) + "]"
    yield line(0) + "}" if members else "{}"
