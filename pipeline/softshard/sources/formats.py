"""The formats of sources, each declared once in `FORMATS`, and the readers of those that are files.

A reader takes a stream of bytes and yields raw documents one at a time. A document that cannot be used is yielded with
its problem and without its text, and reading continues with the next one. Of a text file or a JSON line, no more than
the largest document allowed and one chunk is in memory. Parquet is decoded page by page, so a page is in memory whole,
and its size is the choice of whoever wrote the file.

To add a format of files, write its reader here and add an entry to `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

from softshard.errors import SourceUnreadable
from softshard.sources.documents import Problem, RawDocument, Source, check_columns, make_document
from softshard.storage import InputFile

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["COMPRESSIONS", "FORMATS", "FileFormat", "HubFormat", "describe_endings"]

COMPRESSIONS = (".zst", ".gz")
"""Endings of compressed files, which may follow the ending of any format of files."""

_CHUNK_BYTES = 2**18
_ROWS_AT_ONCE = 16


class Reader(Protocol):
    """Reads the documents of one file."""

    def __call__(
        self, stream: BinaryIO, /, *, name: str, source: Source, max_document_bytes: int
    ) -> Iterator[RawDocument]:
        """Documents in the order of the file. Raises SourceUnreadable, or what the stream or pyarrow raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFormat:
    """A format of files."""

    title: str
    """For people."""
    endings: tuple[str, ...]
    """Endings of file names by which `auto` knows it, in lower case."""
    read: Reader
    needs_seek: bool = False
    """Whether `read` needs a stream that can seek; a compressed file is then unpacked to a temporary file."""


class HubFormat(Protocol):
    """A format that a library lists and reads, by the name of a data set or a local folder."""

    namespace: str
    """Namespace of its data sets in lineage events."""

    def list_files(self, source: Source) -> list[InputFile]:
        """Files of the data set, with their versions. Raises SourceUnreadable."""

    def read(self, source: Source, *, max_document_bytes: int) -> Iterator[RawDocument]:
        """Documents of the data set. Raises SourceUnreadable."""


def _read_text(stream: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """The whole stream as one document; reading stops at the limit."""
    content = bytearray()
    while len(content) <= max_document_bytes and (chunk := stream.read(_CHUNK_BYTES)):
        content += chunk
    yield make_document(content, group=None, name=name, source=source, max_document_bytes=max_document_bytes)


def _read_json_lines(stream: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """One document per line; empty lines are skipped. A line that is longer than a document may be is oversize."""
    for number, line in enumerate(_lines(stream, max_document_bytes), start=1):
        place = f"{name}, line {number}"
        if line is None:
            yield RawDocument(name=place, text=None, group=source.name, problem="oversize")
        elif line.strip():
            yield _json_document(line, place, source, max_document_bytes)


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their newline; None for a line longer than max_bytes.

    The `readline` of some file systems' streams has no limit, so lines are split here.
    """
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


def _json_document(line: bytes, name: str, source: Source, max_document_bytes: int) -> RawDocument:
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
            return make_document(
                row[source.text_field],
                group=group,
                name=name,
                source=source,
                max_document_bytes=max_document_bytes,
            )
    return RawDocument(name=name, text=None, group=source.name, problem=problem)


def _read_parquet(file: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """One document per row, of a file that can seek; only the text and group columns are read.

    Raises:
        SourceUnreadable: a column is not there, or the text column holds no text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

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
            yield make_document(
                text,
                group=group,
                name=f"{name}, row {number}",
                source=source,
                max_document_bytes=max_document_bytes,
            )


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


class _Datasets:
    """Hugging Face `datasets`, which is imported when it is used."""

    namespace = "hf://datasets"

    def list_files(self, source: Source) -> list[InputFile]:
        """See `list_dataset`."""
        from softshard.sources.dataset import list_dataset

        return list_dataset(source)

    def read(self, source: Source, *, max_document_bytes: int) -> Iterator[RawDocument]:
        """See `read_dataset`."""
        from softshard.sources.dataset import read_dataset

        return read_dataset(source, max_document_bytes=max_document_bytes)


FORMATS: dict[str, FileFormat | HubFormat] = {
    "text": FileFormat(title="text", endings=(".txt", ".text", ".md", ".markdown"), read=_read_text),
    "jsonl": FileFormat(title="JSON Lines", endings=(".jsonl", ".ndjson"), read=_read_json_lines),
    "parquet": FileFormat(title="Parquet", endings=(".parquet",), read=_read_parquet, needs_seek=True),
    "datasets": _Datasets(),
}
"""All formats by the name that a job file gives them."""


def describe_endings() -> str:
    """How `format: auto` finds the format of a file, as a sentence for the job file reference."""
    formats = [item for item in FORMATS.values() if isinstance(item, FileFormat)]
    first, *others = (f"{' '.join(item.endings)} {{verb}}{item.title}" for item in formats)
    listed = ", ".join([first.format(verb="are "), *(other.format(verb="") for other in others)])
    compressions = " and ".join(f"`{ending}`" for ending in COMPRESSIONS)
    return f"`auto` goes by the ending: {listed}; {compressions} may follow any of them."
