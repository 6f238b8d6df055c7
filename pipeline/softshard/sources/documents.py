"""Raw documents: the values of a source's fields, checked and decoded."""

from __future__ import annotations

import datetime
import decimal
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import unquote

from softshard.errors import SourceUnreadable

__all__ = [
    "Problem",
    "RawDocument",
    "Source",
    "Turn",
    "Turns",
    "check_columns",
    "find_partitions",
    "kind_name",
    "make_document",
    "unusable_document",
]

Problem = Literal["undecodable", "oversize", "malformed", "dropped"]

Role = Literal["system", "user", "assistant"]

_PARTITION = re.compile(r"([^/=]+)=([^/]*)(?=/)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "true or false"),
    ((int, float, decimal.Decimal), "a number"),
    (dict, "an object"),
    ((datetime.date, datetime.time, datetime.timedelta), "a date or time"),
    ((str, bytes, bytearray), "text"),
)


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
    def encoding(self) -> str:
        """Encoding of text and JSON Lines without a byte order mark."""

    @property
    def text_field(self) -> str:
        """Field or column that holds the text."""

    @property
    def group_field(self) -> str | None:
        """Field or column that holds the group; None: the group is the source's name."""

    @property
    def drop_texts(self) -> tuple[str, ...]:
        """Texts that stand for one that is gone."""

    @property
    def split_texts(self) -> str:
        """Where a text is split into documents: none, lines, blank_lines or headings."""

    @property
    def configuration(self) -> str | None:
        """Configuration of a data set; None: its default."""

    @property
    def split(self) -> str:
        """Split of a data set."""

    @property
    def max_documents(self) -> int | None:
        """Read at most this many documents; None: all."""

    @property
    def layout(self) -> str:
        """How a row holds its document: a layout of conversations, text, or auto."""

    @property
    def roles(self) -> Mapping[str, str]:
        """Roles of a conversation by the names that a row gives them, beyond the usual ones."""

    @property
    def answers(self) -> str:
        """Who answers in a conversation: assistant, last, first, second, both, or a name."""

    @property
    def system(self) -> str | None:
        """System prompt of a conversation that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side of a conversation says at a time."""

    role: Role
    text: str
    answer: bool = False
    """Whether its tokens are labels; only what the assistant says can be."""


Turns = tuple[Turn, ...]


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
    """undecodable: not in its encoding; oversize: longer than allowed; malformed: no object, no such field, or not text
    in it; dropped: one of the source's `drop_texts`."""
    reason: str = ""
    """What is wrong with a malformed document, such as `has no field 'text'`."""
    views: tuple[Turns, ...] = ()
    """The turns of a conversation, once for each person who answers in it; empty for a text."""


def unusable_document(*, name: str, source: Source, problem: Problem, reason: str = "") -> RawDocument:
    """A document without a text."""
    return RawDocument(name=name, text=None, group=source.name, problem=problem, reason=reason)


def make_document(value: object, *, group: object, name: str, source: Source, max_document_bytes: int) -> RawDocument:
    """A raw document from the values of the text field and the group field.

    The text is a str or UTF-8 bytes. So is the group; a group of None means the source's name, a number, date or time
    is written out, and any other group makes the document malformed.
    """
    if not isinstance(value, str | bytes | bytearray):
        reason = f"its field {source.text_field!r} holds {kind_name(value)}, not text; {_remedy(value)}"
        return unusable_document(name=name, source=source, problem="malformed", reason=reason)
    if (problem := _group_problem(group, source)) is not None:
        return unusable_document(name=name, source=source, problem="malformed", reason=problem)
    try:
        content = value.encode() if isinstance(value, str) else value
        if len(content) > max_document_bytes:
            return unusable_document(name=name, source=source, problem="oversize")
        text, group_name = content.decode("utf-8-sig"), _group_name(group, source)
    except UnicodeError:
        return unusable_document(name=name, source=source, problem="undecodable")
    if source.drop_texts and text.strip() in source.drop_texts:
        return RawDocument(name=name, text=None, group=group_name, problem="dropped")
    return RawDocument(name=name, text=text, group=group_name, problem=None)


def kind_name(value: object) -> str:
    """The kind of a value in the words of JSON, for messages."""
    return next((title for kinds, title in _KINDS if isinstance(value, kinds)), _list_name(value))


def _list_name(value: object) -> str:
    if not isinstance(value, list | tuple):
        return f"a value of type {type(value).__name__}"
    return "a list of objects" if value and isinstance(value[0], dict) else "a list"


def _group_problem(group: object, source: Source) -> str | None:
    scalar = str | bytes | int | float | decimal.Decimal | datetime.date | datetime.time
    if group is None or isinstance(group, scalar):
        return None
    problem = f"its field {source.group_field!r}, the `group_field`, holds {kind_name(group)} and no name"
    return f"{problem}; name another `group_field`, or leave it out"


def _remedy(value: object) -> str:
    if kind_name(value) == "a list of objects":
        return "join the messages of a conversation into one text, or name another `text_field`"
    return "name another `text_field`"


def _group_name(group: object, source: Source) -> str:
    """Raises UnicodeError for what is not UTF-8, and for half a surrogate pair, which JSON can spell."""
    if group is None:
        return source.name
    name = group.decode() if isinstance(group, bytes) else str(group)
    name.encode()
    return name


def find_partitions(uri: str) -> dict[str, str | None]:
    """Values that the folders of a URI give to fields, as in `lang=en/part.parquet`; Hive's name of null is None."""
    return {key: None if value == _NO_VALUE else unquote(value) for key, value in _PARTITION.findall(uri)}


def check_columns(wanted: Sequence[str], present: Sequence[str], *, source: Source, uri: str) -> None:
    """Refuse a table that lacks a column. Raises SourceUnreadable, which lists the columns that are present."""
    for column in wanted:
        if column not in present:
            problem = f"has no column {column!r}; its columns are {', '.join(present)}"
            raise SourceUnreadable(source=source.name, uri=uri, problem=problem)
