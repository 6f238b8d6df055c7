"""Reads Parquet: one document per row. A page is in memory whole, and whoever wrote the file chose its size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from softshard.errors import SourceUnreadable
from softshard.sources.conversations import check_conversation_columns, find_layout, make_conversation
from softshard.sources.documents import (
    RawDocument,
    Source,
    check_columns,
    find_partitions,
    make_document,
    unusable_document,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["read_parquet"]

_BUFFER_BYTES = 2**18
_ROWS_AT_ONCE = 16


def read_parquet(file: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """One document per row, of a file that can seek; only the columns of text or conversation and group are read.

    A file whose text column has the type of nothing but nulls has no documents.

    Raises:
        SourceUnreadable: a column is not there, or holds neither text nor what can name a group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    schema = parquet.schema_arrow
    group_column, group, partitions = source.group_field, None, find_partitions(name)
    if group_column is not None and group_column in partitions and group_column not in schema.names:
        group, group_column = partitions[group_column], None
    if find_layout(source, schema.names) != "text":
        yield from _read_conversations(parquet, group_column, group, name, source, max_document_bytes)
        return
    columns = [source.text_field] + ([] if group_column is None else [group_column])
    check_columns(columns, schema.names, source=source, uri=name)
    _check_kinds(schema, group_column, name=name, source=source)
    if pa.types.is_null(schema.field(source.text_field).type):
        return
    number = 0
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, use_threads=False):
        texts = _values(batch.column(source.text_field))
        groups = [group] * len(texts) if group_column is None else _values(batch.column(group_column))
        for text, row_group in zip(texts, groups, strict=True):
            number += 1
            place = f"{name}, row {number}"
            yield make_document(text, group=row_group, name=place, source=source, max_document_bytes=max_document_bytes)


def _read_conversations(
    parquet: pq.ParquetFile,
    group_column: str | None,
    group: str | None,
    name: str,
    source: Source,
    max_document_bytes: int,
) -> Iterator[RawDocument]:
    present = parquet.schema_arrow.names
    columns = check_conversation_columns(source, present, uri=name)
    if group_column is not None:
        check_columns([group_column], present, source=source, uri=name)
        _check_group(parquet.schema_arrow, group_column, name=name, source=source)
        columns = list(dict.fromkeys([*columns, group_column]))
    number = 0
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, use_threads=False):
        for index in range(batch.num_rows):
            number += 1
            place = f"{name}, row {number}"
            try:
                (row,) = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield unusable_document(name=place, source=source, problem="undecodable")
                continue
            named = group if group_column is None else row[group_column]
            yield make_conversation(row, group=named, name=place, source=source, max_document_bytes=max_document_bytes)


def _check_kinds(schema: pa.Schema, group_column: str | None, *, name: str, source: Source) -> None:
    from pyarrow import types

    kind = schema.field(source.text_field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not _is_text(plain) and not types.is_null(plain):
        problem = f"column {source.text_field!r} holds {kind}, not text; name another with `text_field`"
        raise SourceUnreadable(source=source.name, uri=name, problem=problem)
    if group_column is not None:
        _check_group(schema, group_column, name=name, source=source)


def _check_group(schema: pa.Schema, group_column: str, *, name: str, source: Source) -> None:
    from pyarrow import types

    if types.is_nested(group_kind := schema.field(group_column).type):
        problem = f"column {group_column!r} holds {group_kind}, which cannot name a group; change `group_field`"
        raise SourceUnreadable(source=source.name, uri=name, problem=problem)


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
    )


def _values(column: pa.Array) -> list[object]:
    """Values of a column, text as bytes: a string that is not UTF-8 makes its own document undecodable alone."""
    import pyarrow as pa

    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if _is_text(plain.type):
        plain = plain.cast(pa.large_binary())
    values: list[object] = plain.to_pylist()
    return values
