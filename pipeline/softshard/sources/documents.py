"""Raw documents: the values of a source's fields, checked and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from softshard.errors import SourceUnreadable

__all__ = ["Problem", "RawDocument", "Source", "check_columns", "make_document"]

Problem = Literal["undecodable", "oversize", "malformed"]


class Source(Protocol):
    """What is read: the settings of one source, as `softshard.config.SourceSettings` has them."""

    @property
    def name(self) -> str:
        """Name of the source, for errors and as the group of documents without one."""

    @property
    def uri(self) -> str:
        """File, folder, glob or fsspec URI, or the name of a data set."""

    @property
    def format(self) -> str:
        """Name of a format, or `auto`."""

    @property
    def text_field(self) -> str:
        """Field or column that holds the text."""

    @property
    def group_field(self) -> str | None:
        """Field or column that holds the group; None: the group is the source's name."""

    @property
    def split(self) -> str:
        """Split of a data set."""

    @property
    def max_documents(self) -> int | None:
        """Read at most this many documents; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawDocument:
    """A document as its source has it, or the reason why it cannot be used."""

    name: str
    """Where it was read, for messages: the URI, and the line or row, counted from 1."""
    text: str | None
    """The text without a byte order mark; None where there is a problem."""
    group: str
    """Value of the source's group field, or the source's name."""
    problem: Problem | None
    """undecodable: not UTF-8; oversize: longer than allowed; malformed: no object, no such field, or not text in it."""


def make_document(value: object, *, group: object, name: str, source: Source, max_document_bytes: int) -> RawDocument:
    """A raw document from the values of the text field and the group field.

    Both are a str or UTF-8 bytes. A group of None means the source's name, a number is written out, and any other
    group makes the document malformed.
    """
    text: str | None = None
    problem: Problem | None = None
    group_name = source.name
    try:
        content = value.encode() if isinstance(value, str) else value
        if not isinstance(content, bytes | bytearray) or not isinstance(group, str | bytes | int | float | None):
            problem = "malformed"
        elif len(content) > max_document_bytes:
            problem = "oversize"
        else:
            group_name = _group_name(group, source)
            text = content.decode("utf-8-sig")
    except UnicodeError:
        problem = "undecodable"
    return RawDocument(name=name, text=text, group=group_name, problem=problem)


def _group_name(group: str | bytes | float | None, source: Source) -> str:
    """Raises UnicodeError for what is not UTF-8, and for half a surrogate pair, which JSON can spell."""
    if group is None:
        return source.name
    name = group.decode() if isinstance(group, bytes) else str(group)
    name.encode()
    return name


def check_columns(wanted: Sequence[str], present: Sequence[str], *, source: Source, uri: str) -> None:
    """Refuse a table that lacks a column. Raises SourceUnreadable, which lists the columns that are present."""
    for column in wanted:
        if column not in present:
            problem = f"has no column {column!r}; its columns are {', '.join(present)}"
            raise SourceUnreadable(source=source.name, uri=uri, problem=problem)
