"""Sources of the corpus: settings in, raw documents out, in the order of the files' names and of their lines or rows.

A folder's files are told apart by their endings. What cannot be listed, opened, decompressed or read as its format is a
`SourceUnreadable` that names the file; what is wrong with one document alone is that document's `problem`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, BinaryIO, cast

import pyarrow as pa

from softshard.config import SourceSettings
from softshard.corpus.formats import RawDocument, read_json_lines, read_parquet, read_text
from softshard.errors import SourceUnreadable, StorageFull
from softshard.storage import InputFile, list_inputs, open_input

__all__ = ["RawDocument", "list_source", "read_documents"]

_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".zst", ".gz")


def list_source(source: SourceSettings) -> list[InputFile]:
    """Files that the documents of a source are read from, sorted by name.

    Raises:
        SourceUnreadable: nothing is there, nothing has an ending that `auto` knows, or it cannot be reached.
    """
    if source.format == "datasets":
        from softshard.corpus.dataset import list_dataset

        return list_dataset(source)
    files = list_inputs(source.uri, source=source.name)
    known = [file for file in files if _format_of(file.uri, source) is not None]
    if not known:
        problem = (
            f"has no ending that `format: auto` knows ({', '.join(_FORMATS)}, each also with .zst or .gz after it);"
            " rename it, or set `format`"
        )
        raise SourceUnreadable(source=source.name, uri=source.uri, problem=problem)
    return known


def read_documents(source: SourceSettings, *, max_document_bytes: int) -> Iterator[RawDocument]:
    """Documents of a source, at most its `max_documents`, those with a problem counted in.

    Raises:
        SourceUnreadable: as `list_source`; or a file is damaged, is not of its format, or lacks a column.
        StorageFull: there is no room to decompress a Parquet file.
    """
    return itertools.islice(_read(source, max_document_bytes), source.max_documents)


def _read(source: SourceSettings, max_document_bytes: int) -> Iterator[RawDocument]:
    if source.format == "datasets":
        from softshard.corpus.dataset import read_dataset

        yield from read_dataset(source, max_document_bytes=max_document_bytes)
        return
    for file in list_source(source):
        with _named_errors(source, file.uri):
            yield from _read_file(file.uri, source, max_document_bytes)


def _read_file(uri: str, source: SourceSettings, max_document_bytes: int) -> Iterator[RawDocument]:
    reader = {"text": read_text, "jsonl": read_json_lines, "parquet": read_parquet}[_format_of(uri, source) or "text"]
    with contextlib.ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(open_input(uri))
        if reader is read_parquet and uri.endswith(_COMPRESSIONS):
            spool = stack.enter_context(tempfile.TemporaryFile())
            _decompress(stream, spool)
            stream = cast("BinaryIO", spool)
        yield from reader(stream, name=uri, source=source, max_document_bytes=max_document_bytes)


def _format_of(uri: str, source: SourceSettings) -> str | None:
    if source.format != "auto":
        return source.format
    for compression in _COMPRESSIONS:
        if uri.endswith(compression):
            uri = uri.removesuffix(compression)
            break
    return _FORMATS.get(PurePosixPath(uri).suffix.lower())


def _decompress(stream: BinaryIO, spool: IO[bytes]) -> None:
    """Parquet is read from its end, and a compressed stream has only a beginning: it goes to a temporary file."""
    try:
        shutil.copyfileobj(stream, spool, 2**20)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(uri=tempfile.gettempdir()) from error
        raise
    spool.seek(0)


@contextlib.contextmanager
def _named_errors(source: SourceSettings, uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise SourceUnreadable(source=source.name, uri=uri, problem=f"cannot be read: {error}") from error
