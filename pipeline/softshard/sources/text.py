"""Reads text files, whole or split into documents, and splits the texts of rows in the same way.

Of a file, no more than the largest document allowed and one chunk is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from softshard.sources.documents import RawDocument, Source, find_partitions, make_document, unusable_document
from softshard.sources.encoding import as_utf8

__all__ = ["CHUNK_BYTES", "SPLITS", "read_lines", "read_text", "split_document"]

CHUNK_BYTES = 2**18
SPLITS = ("none", "lines", "blank_lines", "headings")
"""Where a text is split into documents."""

_HEADING = re.compile(rb" {0,3}#{1,6}(\s|$)")
_FENCE = re.compile(rb" {0,3}(```|~~~)")


def read_text(stream: BinaryIO, *, name: str, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """The whole stream as one document, of which no more than the limit is read, or its pieces."""
    text = as_utf8(stream, encoding=source.encoding)
    group = find_partitions(name).get(source.group_field or "")
    if source.split_texts != "none":
        lines = read_lines(text, max_document_bytes)
        yield from _make_pieces(lines, group=group, name=name, source=source, max_document_bytes=max_document_bytes)
        return
    content = bytearray()
    while len(content) <= max_document_bytes and (chunk := text.read(CHUNK_BYTES)):
        content += chunk
    yield make_document(content, group=group, name=name, source=source, max_document_bytes=max_document_bytes)


def split_document(document: RawDocument, *, source: Source, max_document_bytes: int) -> Iterator[RawDocument]:
    """The pieces of a row's text; a conversation, and a document with a problem, as it is."""
    if document.text is None or document.views or source.split_texts == "none":
        yield document
        return
    lines = document.text.encode().split(b"\n")
    yield from _make_pieces(
        lines, group=document.group, name=document.name, source=source, max_document_bytes=max_document_bytes
    )


def read_lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their newline; None for a line longer than max_bytes.

    The `readline` of some file systems' streams has no limit, so lines are split here.
    """
    held = bytearray()
    dropping = False
    while chunk := stream.read(CHUNK_BYTES):
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


def _make_pieces(
    lines: Iterable[bytes | None], *, group: str | None, name: str, source: Source, max_document_bytes: int
) -> Iterator[RawDocument]:
    """A document per piece, named after the line on which it begins."""
    for number, content in _PIECES[source.split_texts](lines, max_document_bytes):
        place = f"{name}, from line {number}"
        if content is None:
            yield unusable_document(name=place, source=source, problem="oversize")
        else:
            yield make_document(content, group=group, name=place, source=source, max_document_bytes=max_document_bytes)


Piece = tuple[int, bytes | None]
"""The number of its first line, and its lines without the blank ones around them; None where it is too long."""


def _lines(lines: Iterable[bytes | None], max_bytes: int) -> Iterator[Piece]:
    """Every line that is not blank."""
    return ((number, line) for number, line in enumerate(lines, start=1) if line is None or line.strip())


def _blank_lines(lines: Iterable[bytes | None], max_bytes: int) -> Iterator[Piece]:
    """What is between blank lines."""
    piece = _PieceInHand(max_bytes)
    for number, line in enumerate(lines, start=1):
        if line is not None and not line.strip():
            yield from piece.take()
        else:
            piece.add(number, line)
    yield from piece.take()


def _headings(lines: Iterable[bytes | None], max_bytes: int) -> Iterator[Piece]:
    """What is between headings of Markdown (`# Title`), each with its heading, or with several that follow directly."""
    piece = _PieceInHand(max_bytes)
    fenced, has_body = False, False
    for number, line in enumerate(lines, start=1):
        is_heading = not fenced and line is not None and _HEADING.match(line) is not None
        if is_heading and has_body:
            yield from piece.take()
            has_body = False
        fenced ^= line is not None and _FENCE.match(line) is not None
        has_body = has_body or (not is_heading and (line is None or bool(line.strip())))
        piece.add(number, line)
    yield from piece.take()


_PIECES: dict[str, Callable[[Iterable[bytes | None], int], Iterator[Piece]]] = {
    "lines": _lines,
    "blank_lines": _blank_lines,
    "headings": _headings,
}


class _PieceInHand:
    """Lines of a piece so far, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lines: list[bytes] = []
        self._first, self._num_bytes, self._too_long = 0, 0, False

    def add(self, number: int, line: bytes | None) -> None:
        """Add a line, or None for one that is too long; a blank line at the beginning is left out."""
        if not self._first and line is not None and not line.strip():
            return
        self._first = self._first or number
        self._num_bytes += 0 if line is None else len(line) + 1
        self._too_long = self._too_long or line is None or self._num_bytes > self._max_bytes + 1
        if self._too_long:
            self._lines.clear()
        elif line is not None:
            self._lines.append(line)

    def take(self) -> Iterator[Piece]:
        """The piece, if there is one, and an empty hand."""
        if self._first:
            yield self._first, None if self._too_long else b"\n".join(self._lines).rstrip()
        self._lines, self._first, self._num_bytes, self._too_long = [], 0, 0, False
