"""Lists and reads the sources of a corpus, in the order of the files' names and of their lines or rows.

With `format: auto`, the ending of each file tells its format, and other files are ignored. A file that cannot be
listed, opened, decompressed or read in its format raises SourceUnreadable, which names it; a server that is away, or a
file that is gone since it was listed, raises SourceUnavailable. A problem of one document alone is that document's
`problem`.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, BinaryIO, cast

import pyarrow as pa

from softshard.errors import SourceUnavailable, SourceUnreadable
from softshard.records.spool import temporary_disk
from softshard.sources.documents import RawDocument, Source
from softshard.sources.formats import COMPRESSIONS, FORMATS, FileFormat
from softshard.storage import (
    InputFile,
    content_version,
    is_missing,
    list_inputs,
    network_errors,
    open_input,
    source_failure,
)

__all__ = ["list_source", "list_versions", "read_documents"]

_BY_ENDING = {ending: item for item in FORMATS.values() if isinstance(item, FileFormat) for ending in item.endings}


def list_source(source: Source) -> list[InputFile]:
    """Files that the documents of a source are read from, sorted by name.

    Raises:
        SourceUnreadable: nothing is there, or nothing has an ending that `auto` knows.
        SourceUnavailable: it cannot be reached for now.
    """
    chosen = FORMATS.get(source.format)
    if chosen is not None and not isinstance(chosen, FileFormat):
        return chosen.list_files(source)
    files = list_inputs(source.uri, source=source.name)
    known = [file for file in files if _file_format(file.uri, source) is not None]
    if not known:
        problem = (
            f"has no ending that `format: auto` knows ({', '.join(_BY_ENDING)}, each also with .zst or .gz after it);"
            " rename it, or set `format`"
        )
        raise SourceUnreadable(source=source.name, uri=source.uri, problem=problem)
    return known


def list_versions(source: Source) -> list[tuple[str, str]]:
    """URI and version of each file of a source; a file of which the file system says nothing is read for it.

    Raises:
        SourceUnavailable, SourceUnreadable: as `list_source`, and when a file that is read for its version cannot be.
    """
    found = []
    for file in list_source(source):
        with _named_errors(source, file.uri):
            found.append((file.uri, file.version or content_version(file.uri)))
    return found


def read_documents(source: Source, *, max_document_bytes: int) -> Iterator[RawDocument]:
    """Documents of a source, at most its `max_documents`, those with a problem counted in.

    Raises:
        SourceUnreadable: as `list_source`; or a file is damaged, is not of its format, or lacks a column.
        SourceUnavailable: a server is away, or a file that was listed is gone.
        StorageFull: there is no room to decompress a Parquet file.
    """
    return itertools.islice(_read(source, max_document_bytes), source.max_documents)


def _read(source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    chosen = FORMATS.get(source.format)
    if chosen is not None and not isinstance(chosen, FileFormat):
        yield from chosen.read(source, max_document_bytes=max_document_bytes)
        return
    for file in list_source(source):
        with _named_errors(source, file.uri):
            yield from _read_file(file.uri, source, max_document_bytes)


def _read_file(uri: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    file_format = _file_format(uri, source)
    assert file_format is not None
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(open_input(uri))
        if file_format.needs_seek and uri.endswith(COMPRESSIONS):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            _unpack(stream, unpacked)
            stream = cast("BinaryIO", unpacked)
        yield from file_format.read(stream, name=uri, source=source, max_document_bytes=max_document_bytes)


def _file_format(uri: str, source: Source) -> FileFormat | None:
    """Format of a file: the source's own, or for `auto` the one of the file's ending; None where it has none."""
    chosen = FORMATS.get(source.format)
    if isinstance(chosen, FileFormat):
        return chosen
    for compression in COMPRESSIONS:
        if uri.endswith(compression):
            uri = uri.removesuffix(compression)
            break
    return _BY_ENDING.get(PurePosixPath(uri).suffix.lower())


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
    except network_errors(OSError, EOFError, zlib.error, pa.ArrowException) as error:
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
