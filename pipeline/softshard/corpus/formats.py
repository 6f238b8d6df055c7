"""File formats: a stream of bytes in, raw documents out, one at a time.

A document that cannot be used is given with its problem and without its text, and reading goes on with the next. Of a
text file or a JSON line no more than the largest document allowed, and one chunk, is held. Parquet is decoded by pages,
so there a page is the least that is held: what lies in it was put together by whoever wrote the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.config import SourceSettings
from softshard.errors import SourceUnreadable

__all__ = ["Problem", "RawDocument", "check_columns", "read_json_lines", "read_parquet", "read_text", "screen_value"]

Problem = Literal["undecodable", "oversize", "malformed"]

_CHUNK_BYTES = 2**18
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDocument:
    """A document as its source has it, or the reason why there is none."""

    name: str
    """Where it stands, for messages: the URI, and the line or row, counted from 1."""
    text: str | None
    """The text without a byte order mark; None where there is a problem."""
    group: str
    """Value of the source's group field, or the source's name."""
    problem: Problem | None
    """undecodable: not UTF-8; oversize: longer than allowed; malformed: no object, no such field, or not text in it."""


def screen_value(
    value: object, *, group: object, name: str, source: SourceSettings, max_document_bytes: int
) -> RawDocument:
    """A raw document from the values of the text field and the group field.

    Both are a str or UTF-8 bytes. A group of None stands for the source's name, a number is written out, and any other
    group makes the document malformed.
    """
    text: str | None = None
    problem: Problem | None = None
    shown = source.name
    try:
        content = value.encode() if isinstance(value, str) else value
        if not isinstance(content, bytes | bytearray) or not isinstance(group, str | bytes | int | float | None):
            problem = "malformed"
        elif len(content) > max_document_bytes:
            problem = "oversize"
        else:
            shown = _shown_group(group, source)
            text = content.decode("utf-8-sig")
    except UnicodeError:
        problem = "undecodable"
    return RawDocument(name=name, text=text, group=shown, problem=problem)


def _shown_group(group: str | bytes | float | None, source: SourceSettings) -> str:
    """Raises UnicodeError for what is not UTF-8, and for half a surrogate pair, which JSON can name."""
    if group is None:
        return source.name
    shown = group.decode() if isinstance(group, bytes) else str(group)
    shown.encode()
    return shown


def check_columns(wanted: Sequence[str], there: Sequence[str], *, source: SourceSettings, uri: str) -> None:
    """Refuse a table that lacks a column. Raises SourceUnreadable, which names the columns that are there."""
    for column in wanted:
        if column not in there:
            problem = f"has no column {column!r}; its columns are {', '.join(there)}"
            raise SourceUnreadable(source=source.name, uri=uri, problem=problem)


def read_text(stream: BinaryIO, *, name: str, source: SourceSettings, max_document_bytes: int) -> Iterator[RawDocument]:
    """The whole stream as one document; an oversize one is read no further than the limit."""
    content = bytearray()
    while len(content) <= max_document_bytes and (chunk := stream.read(_CHUNK_BYTES)):
        content += chunk
    yield screen_value(content, group=None, name=name, source=source, max_document_bytes=max_document_bytes)


def read_json_lines(
    stream: BinaryIO, *, name: str, source: SourceSettings, max_document_bytes: int
) -> Iterator[RawDocument]:
    """One document a line; empty lines are none. A line longer than a document may be is oversize."""
    for number, line in enumerate(_lines(stream, max_document_bytes), start=1):
        place = f"{name}, line {number}"
        if line is None:
            yield RawDocument(name=place, text=None, group=source.name, problem="oversize")
        elif line.strip():
            yield _json_document(line, place, source, max_document_bytes)


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their newline, None for one longer than max_bytes. Not every file system's stream has a bounded
    readline."""
    held = bytearray()
    dropping = False
    while chunk := stream.read(_CHUNK_BYTES):
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            yield None if dropping or len(held) + len(piece) > max_bytes else bytes(held + piece)
            held.clear()
            dropping = False
        dropping = dropping or len(held) + len(rest) > max_bytes
        if dropping:
            held.clear()
        else:
            held += rest
    if dropping:
        yield None
    elif held:
        yield bytes(held)


def _json_document(line: bytes, name: str, source: SourceSettings, max_document_bytes: int) -> RawDocument:
    problem: Problem = "malformed"
    fields = [field for field in (source.text_field, source.group_field) if field is not None]
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        problem = "undecodable"
    except (ValueError, RecursionError):
        problem = "malformed"
    else:
        if isinstance(row, dict) and all(field in row for field in fields):
            group = row[source.group_field] if source.group_field is not None else None
            return screen_value(
                row[source.text_field],
                group=group,
                name=name,
                source=source,
                max_document_bytes=max_document_bytes,
            )
    return RawDocument(name=name, text=None, group=source.name, problem=problem)


def read_parquet(
    file: BinaryIO, *, name: str, source: SourceSettings, max_document_bytes: int
) -> Iterator[RawDocument]:
    """One document a row, of a file that can seek; only the columns asked for are read.

    Raises:
        SourceUnreadable: a column is not there, or the text column holds no text.
    """
    parquet = pq.ParquetFile(file, buffer_size=_CHUNK_BYTES, pre_buffer=False)
    columns = [field for field in (source.text_field, source.group_field) if field is not None]
    check_columns(columns, parquet.schema_arrow.names, source=source, uri=name)
    kind = parquet.schema_arrow.field(source.text_field).type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        problem = f"column {source.text_field!r} holds {kind}, not text; name another with `text_field`"
        raise SourceUnreadable(source=source.name, uri=name, problem=problem)
    number = 0
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, use_threads=False):
        texts = _values(batch.column(source.text_field))
        groups = _values(batch.column(source.group_field)) if source.group_field else [None] * len(texts)
        for text, group in zip(texts, groups, strict=True):
            number += 1
            yield screen_value(
                text,
                group=group,
                name=f"{name}, row {number}",
                source=source,
                max_document_bytes=max_document_bytes,
            )


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
    )


def _values(column: pa.Array) -> list[object]:
    """Text as bytes: nobody checks that Parquet's strings are UTF-8, and so a bad one spoils its own document alone."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if _is_text(plain.type):
        plain = plain.cast(pa.large_binary())
    values: list[object] = plain.to_pylist()
    return values
