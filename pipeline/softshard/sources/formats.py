"""The formats of sources, each declared once in `FORMATS`.

A reader of files takes a stream of bytes and yields raw documents one at a time. A document that cannot be used is
yielded with its problem and without its text, and reading continues with the next one. No more than the largest
document allowed and one chunk, or one page of Parquet, is in memory.

To add a format of files, write its reader in a module and add an entry to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from softshard.sources.documents import RawDocument, Source
from softshard.sources.json_lines import JSON_REMEDY, read_json_lines
from softshard.sources.parquet import read_parquet
from softshard.sources.text import read_text
from softshard.storage import COMPRESSIONS, InputFile, without_compression

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "REMEDIES",
    "FileFormat",
    "HubFormat",
    "describe_endings",
    "find_ending",
    "find_remedy",
]


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
    splits_texts: bool = False
    """Whether `read` itself splits texts into documents, as `split_texts` says; else the text of each row is split."""


class HubFormat(Protocol):
    """A format that a library lists and reads, by the name of a data set or a local folder."""

    namespace: str
    """Namespace of its data sets in lineage events."""

    def list_files(self, source: Source) -> list[InputFile]:
        """Files of the data set, with their versions. Raises SourceUnreadable."""

    def read(self, source: Source, *, max_document_bytes: int) -> Iterator[RawDocument]:
        """Documents of the data set. Raises SourceUnreadable."""


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
    "text": FileFormat(title="text", endings=(".txt", ".text", ".md", ".markdown"), read=read_text, splits_texts=True),
    "jsonl": FileFormat(title="JSON Lines", endings=(".jsonl", ".ndjson"), read=read_json_lines),
    "parquet": FileFormat(title="Parquet", endings=(".parquet",), read=read_parquet, needs_seek=True),
    "datasets": _Datasets(),
}
"""All formats by the name that a job file gives them."""


REMEDIES = {
    ".json": f"if each line of a .json file is one object, set `format: jsonl`; else convert it, {JSON_REMEDY}",
    ".csv": "convert .csv, in Python: polars.read_csv('a.csv').write_parquet('a.parquet')",
    ".tsv": "convert .tsv, in Python: polars.read_csv('a.tsv', separator='\\t').write_parquet('a.parquet')",
    ".arrow": "set `format: datasets` for a folder that `save_to_disk` wrote; convert other .arrow, in Python:"
    " polars.read_ipc('a.arrow').write_parquet('a.parquet')",
}
"""What to do with files that people have data in and that no format of `FORMATS` reads, by their ending."""


def find_remedy(uri: str) -> str | None:
    """What to do with a file or a glob of that name, which no format reads; None for a folder and every other name."""
    return None if Path(uri).is_dir() else REMEDIES.get(find_ending(uri))


def find_ending(uri: str) -> str:
    """The ending of a file's name in lower case, without that of its compression; empty where it has none."""
    return PurePosixPath(without_compression(uri)).suffix.lower()


def describe_endings() -> str:
    """How `format: auto` finds the format of a file, as a sentence for the job file reference."""
    formats = [item for item in FORMATS.values() if isinstance(item, FileFormat)]
    first, *others = (f"{' '.join(item.endings)} {{verb}}{item.title}" for item in formats)
    listed = ", ".join([first.format(verb="are "), *(other.format(verb="") for other in others)])
    compressions = f"{' '.join(COMPRESSIONS[:-1])} or {COMPRESSIONS[-1]}"
    known = f"`auto` goes by the ending: {listed}; {compressions} may follow any of them"
    return f"{known}. A file of another ending is not read, and named."
