"""Reads the documents of a source, in the order of the files' names and of their lines or rows.

A file that cannot be listed, opened, decompressed or read in its format raises SourceUnreadable, which names it; a
server that is away, or a file that is gone since it was listed, raises SourceUnavailable. A problem of one document
alone is that document's `problem`.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

import pyarrow as pa

from softshard.errors import SourceUnavailable, SourceUnreadable
from softshard.records.spool import temporary_disk
from softshard.sources.documents import RawDocument, Source
from softshard.sources.formats import FORMATS, FileFormat
from softshard.sources.listing import find_format, list_files, list_source
from softshard.sources.not_read import NotRead
from softshard.sources.text import split_document
from softshard.storage import (
    InputChanged,
    content_version,
    find_compression,
    forget_listings,
    is_missing,
    is_unchanged,
    network_errors,
    open_input,
    source_failure,
)

__all__ = ["list_source", "list_versions", "read_documents"]


def list_versions(source: Source) -> list[tuple[str, str]]:
    """URI and version of each file of a source; a file of which the file system says nothing is read for it.

    Raises:
        SourceUnavailable, SourceUnreadable: as `list_source`, and when a file that is read for its version cannot be.
    """
    found = []
    forget_listings(source.uri)
    for file in list_source(source):
        with _named_errors(source, file.uri):
            found.append((file.uri, file.version or content_version(file.uri)))
    return found


def read_documents(
    source: Source, *, max_document_bytes: int, not_read: NotRead | None = None
) -> Iterator[RawDocument]:
    """Documents of a source, at most its `max_documents`, those with a problem counted in.

    Files that are not read, and those without a document, are added to `not_read`.

    Raises:
        SourceUnreadable: as `list_source`; or a file is damaged, is not of its format, or lacks a column.
        SourceUnavailable: a server is away, or a file that was listed is gone.
        StorageFull: there is no room to decompress a Parquet file.
    """
    passed_over = NotRead() if not_read is None else not_read
    return itertools.islice(_read(source, max_document_bytes, passed_over), source.max_documents)


def _read(source: Source, max_document_bytes: int, not_read: NotRead) -> Iterator[RawDocument]:
    chosen = FORMATS.get(source.format)
    if chosen is not None and not isinstance(chosen, FileFormat):
        for row in chosen.read(source, max_document_bytes=max_document_bytes):
            yield from split_document(row, source=source, max_document_bytes=max_document_bytes)
        return
    for file in list_files(source, not_read=not_read):
        is_empty = True
        if file.size != 0:
            with _named_errors(source, file.uri):
                for document in _read_file(file.uri, source, max_document_bytes):
                    is_empty = False
                    yield document
                if not is_unchanged(file):
                    raise InputChanged("it changed while it was read")
        if is_empty:
            not_read.add("empty", file.uri)


def _read_file(uri: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    file_format = find_format(uri, source)
    assert file_format is not None
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(open_input(uri))
        if file_format.needs_seek and find_compression(uri) is not None:
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            _unpack(stream, unpacked)
            stream = cast("BinaryIO", unpacked)
        documents = file_format.read(stream, name=uri, source=source, max_document_bytes=max_document_bytes)
        if file_format.splits_texts:
            _refuse_plain_text(uri, source)
            yield from documents
            return
        for document in documents:
            yield from split_document(document, source=source, max_document_bytes=max_document_bytes)


def _refuse_plain_text(uri: str, source: Source) -> None:
    if source.layout not in ("text", "auto"):
        problem = f"is plain text, and `layout: {source.layout}` is of rows: JSON Lines, Parquet or a data set"
        raise SourceUnreadable(source=source.name, uri=uri, problem=problem)


def _unpack(stream: BinaryIO, file: IO[bytes]) -> None:
    """Unpack a stream to a temporary file and go to its beginning. Raises StorageFull."""
    with temporary_disk():
        shutil.copyfileobj(stream, file, 2**20)
        file.flush()
    file.seek(0)


@contextlib.contextmanager
def _named_errors(source: Source, uri: str) -> Iterator[None]:
    try:
        yield
    except network_errors(OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        failure: SourceUnavailable | SourceUnreadable = source_failure(error, source=source.name, uri=uri)
        if isinstance(failure, SourceUnreadable) and is_missing(error) and _is_gone(source, uri):
            failure = SourceUnavailable(source=source.name, uri=uri, reason="it was listed and is gone")
        raise failure from error


def _is_gone(source: Source, uri: str) -> bool:
    """Whether a file is not listed any more; a link to nothing, for one, is listed and can never be read."""
    try:
        return all(file.uri != uri for file in list_source(source))
    except SourceUnreadable:
        return True
