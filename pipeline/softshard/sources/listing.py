"""Lists the files of a source, and says which of them are not read.

Of a folder, `LICENSE` beside other files is left out, and so are its own `README`, every other one where it has files
of rows, and everything whose name begins with an underscore, by which Spark marks what is no data. A file that is named
itself is never left out, nor is one that a glob matches by more than a bare `*` or `**`. With `format: auto`, the
ending of each file tells its format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from softshard.errors import SourceUnreadable
from softshard.sources.documents import Source
from softshard.sources.formats import COMPRESSIONS, FORMATS, REMEDIES, FileFormat, find_ending
from softshard.sources.not_read import NotRead
from softshard.storage import InputFile, find_compression, find_inputs

__all__ = ["find_format", "list_files", "list_source"]

_ENDING = r"(?i:\.(md|markdown|txt|text|rst|cff|html))?"
_README = re.compile(f"(?i:readme){_ENDING}")
# A document may well be called notice.txt.
_LICENCE = re.compile(f"((?i:licen[cs]e)|COPYING|NOTICE|CITATION){_ENDING}")


def list_source(source: Source, *, not_read: NotRead | None = None) -> list[InputFile]:
    """Files that the documents of a source are read from, sorted by name; all others are added to `not_read`.

    Raises:
        SourceUnreadable: nothing is there, nothing has an ending that `auto` knows, or it cannot be reached.
    """
    chosen = FORMATS.get(source.format)
    if chosen is not None and not isinstance(chosen, FileFormat):
        return chosen.list_files(source)
    return list_files(source, not_read=NotRead() if not_read is None else not_read)


def list_files(source: Source, *, not_read: NotRead) -> list[InputFile]:
    """`list_source` of a source that is files."""
    inputs = find_inputs(source.uri, source=source.name)
    for folder in inputs.folders:
        not_read.add("folder", folder)
    files = _leave_out(inputs.files, source, not_read)
    known = [file for file in files if find_format(file.uri, source) is not None]
    unknown = [file for file in files if find_format(file.uri, source) is None]
    for file in unknown:
        not_read.add(_full_ending(file.uri), file.uri)
    if not known:
        raise SourceUnreadable(source=source.name, uri=source.uri, problem=_nothing_known(unknown, not_read))
    return known


def _leave_out(files: Sequence[InputFile], source: Source, not_read: NotRead) -> list[InputFile]:
    """The files without those that are no data; where nothing else is there, README and LICENSE are the data."""
    marked = {file.uri for file in files if any(part.startswith("_") for part in file.found)}
    data = [file for file in files if file.uri not in marked]
    has_rows = any(_holds_rows(file, source) for file in data)
    about = {file.uri for file in data if _is_about_data(file, has_rows=has_rows)}
    if len(about) == len(data):
        about = set()
    for file in files:
        if file.uri in marked:
            not_read.add("_*", file.uri)
        elif file.uri in about:
            not_read.add("README or LICENSE", file.uri)
    return [file for file in data if file.uri not in about]


def _holds_rows(file: InputFile, source: Source) -> bool:
    known = find_format(file.uri, source)
    return find_ending(file.uri) in REMEDIES if known is None else known is not FORMATS["text"]


def _is_about_data(file: InputFile, *, has_rows: bool) -> bool:
    """Whether a file is a licence or the like, or a README that is at the top or in a source of rows."""
    name = PurePosixPath(file.uri).name
    if file.found[-1:] != (name,):
        return False
    is_readme = _README.fullmatch(name) is not None and (has_rows or len(file.found) == 1)
    return is_readme or _LICENCE.fullmatch(name) is not None


def find_format(uri: str, source: Source) -> FileFormat | None:
    """Format of a file: the source's own, or for `auto` the one of the file's ending; None where it has none."""
    chosen = FORMATS.get(source.format)
    if isinstance(chosen, FileFormat):
        return chosen
    return _formats_by_ending().get(find_ending(uri))


def _formats_by_ending() -> dict[str, FileFormat]:
    formats = [item for item in FORMATS.values() if isinstance(item, FileFormat)]
    return {ending: item for item in formats for ending in item.endings}


def _full_ending(uri: str) -> str:
    """`.json.gz`, or `without an ending`."""
    return f"{find_ending(uri)}{find_compression(uri) or ''}" or "without an ending"


def _nothing_known(files: Sequence[InputFile], not_read: NotRead) -> str:
    endings = f"{', '.join(_formats_by_ending())}, each also with {', '.join(COMPRESSIONS[:-1])} or {COMPRESSIONS[-1]}"
    found = dict.fromkeys(find_ending(file.uri) for file in files)
    remedies = [REMEDIES[ending] for ending in found if ending in REMEDIES]
    remedy = "; ".join(remedies) or "rename it, or set `format`"
    return f"has no ending that `format: auto` knows ({endings} after it); {remedy}; {not_read.describe()}"
