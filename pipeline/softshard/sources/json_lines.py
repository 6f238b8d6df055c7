"""Reads JSON Lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO, cast

from softshard.errors import SourceUnreadable
from softshard.sources.conversations import find_layout, make_conversation
from softshard.sources.documents import (
    Problem,
    RawDocument,
    Source,
    find_partitions,
    kind_name,
    make_document,
    unusable_document,
)
from softshard.sources.encoding import as_utf8
from softshard.sources.text import CHUNK_BYTES, read_lines
from softshard.storage import PrefixedStream

__all__ = ["JSON_REMEDY", "read_json_lines"]

JSON_REMEDY = "in Python: polars.read_json('a.json').write_ndjson('a.jsonl')"
"""How a JSON array becomes JSON Lines."""


def read_json_lines(stream: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """One document per line; empty lines are skipped. A line that is longer than a document may be is oversize.

    Raises:
        SourceUnreadable: the file is one JSON value over several lines.
    """
    text = as_utf8(stream, encoding=source.encoding)
    head = text.read(CHUNK_BYTES)
    _refuse_one_value(head, name=name, source=source)
    whole = cast("BinaryIO", PrefixedStream(head, text))
    for number, line in enumerate(read_lines(whole, max_document_bytes), start=1):
        place = f"{name}, line {number}"
        if line is None:
            yield unusable_document(name=place, source=source, problem="oversize")
        elif line.strip():
            yield _read_line(line, place, name, source, max_document_bytes)


def _refuse_one_value(head: bytes, *, name: str, source: Source) -> None:
    """Refuse an array that is not closed on its first line, and an object of which that line is the opening brace."""
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].strip()
    if first == b"{":
        found = "one JSON object over several lines"
    elif first.startswith(b"[") and not _is_json(first):
        found = "a JSON array"
    else:
        return
    problem = f"is {found}, and JSON Lines has one object per line; convert it, {JSON_REMEDY}"
    raise SourceUnreadable(source=source.name, uri=name, problem=problem)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_line(line: bytes, place: str, name: str, source: Source, max_document_bytes: int) -> RawDocument:
    problem: Problem = "malformed"
    reason = "is not JSON, of which every line has to be one object"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        problem, reason = "undecodable", ""
    except (ValueError, RecursionError):
        if b"\x00" in line:  # as in every line of UTF-16 without a mark, and never in JSON
            problem, reason = "undecodable", ""
    else:
        if isinstance(row, dict):
            return _read_object(row, place, name, source, max_document_bytes)
        reason = f"is {kind_name(row)}, and every line has to be one object; an array is converted, {JSON_REMEDY}"
    return unusable_document(name=place, source=source, problem=problem, reason=reason)


def _read_object(row: dict[str, object], place: str, name: str, source: Source, max_document_bytes: int) -> RawDocument:
    field, layout = source.group_field, find_layout(source, row)
    groups = row if field in row else find_partitions(name)
    reason = ""
    if layout == "text" and source.text_field not in row:
        reason = f"has no field {source.text_field!r}"
    elif field is not None and field not in groups:
        reason = f"has no field {field!r}, the `group_field`"
    if reason:
        return unusable_document(name=place, source=source, problem="malformed", reason=reason)
    group = None if field is None else groups[field]
    limit = max_document_bytes
    if layout == "text":
        return make_document(row[source.text_field], group=group, name=place, source=source, max_document_bytes=limit)
    return make_conversation(row, group=group, name=place, source=source, max_document_bytes=limit)
