"""Canonical JSON of a record with one long list, written and read with one item of the list in memory at a time.

Byte by byte what `canonical_json` and `canonical_digest` make of the whole record: sorted keys, and either an
indentation of one and a newline at the end, or no space at all.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, BinaryIO

from pydantic import BaseModel

__all__ = ["canonical_json", "digest_by_item", "read_by_item", "write_by_item"]

_BLOCK_BYTES = 2**18
_IN_NUMBERS = {"", *"0123456789.eE+-"}


def canonical_json(record: BaseModel) -> bytes:
    """The record as indented JSON with sorted keys, ending in a newline."""
    return (json.dumps(record.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def write_by_item(file: IO[bytes], values: Mapping[str, Any], *, name: str, items: Iterable[Any]) -> None:
    """Write a record as `canonical_json` does.

    Args:
        file: open for writing.
        values: plain values of the record but for the list.
        name: key of the list.
        items: plain values of the list.
    """
    for piece in _pieces(values, name, items, indent=1):
        file.write(piece.encode())
    file.write(b"\n")


def digest_by_item(values: Mapping[str, Any], *, name: str, items: Iterable[Any]) -> str:
    """`canonical_digest` a record; arguments as for `write_by_item`."""
    digest = hashlib.sha256()
    for piece in _pieces(values, name, items, indent=None):
        digest.update(piece.encode())
    return digest.hexdigest()


def _pieces(values: Mapping[str, Any], name: str, items: Iterable[Any], *, indent: int | None) -> Iterator[str]:
    def dumps(value: Any, *, depth: int) -> str:
        separators = (",", ": ") if indent else (",", ":")
        text = json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False)
        return text.replace("\n", line(depth)) if indent else text

    def line(depth: int) -> str:
        return "\n" + " " * (indent * depth) if indent else ""

    for place, key in enumerate(sorted([*values, name])):
        yield ("," if place else "{") + line(1) + dumps(key, depth=0) + (": " if indent else ":")
        if key != name:
            yield dumps(values[key], depth=1)
            continue
        empty = True
        for item in items:
            yield ("[" if empty else ",") + line(2) + dumps(item, depth=2)
            empty = False
        yield "[]" if empty else line(1) + "]"
    yield line(0) + "}"


def read_by_item(file: BinaryIO, *, name: str, on_item: Callable[[Any], None]) -> dict[str, Any]:
    """Members of a JSON object, in any layout, but for one list, whose items are handed on one by one.

    Raises:
        ValueError: it is not JSON, not an object, or the member of that name is not a list.
    """
    scanner = _Scanner(file)
    values: dict[str, Any] = {}
    for _ in scanner.members("{", "}"):
        key = scanner.value()
        scanner.expect(":")
        if key != name:
            values[key] = scanner.value()
            continue
        for _ in scanner.members("[", "]"):
            on_item(scanner.value())
    scanner.expect("")
    return values


class _Scanner:
    """Reads JSON values from a file, a block at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._blocks = codecs.iterdecode(iter(lambda: file.read(_BLOCK_BYTES), b""), "utf-8")
        self._decoder = json.JSONDecoder()
        self._text, self._place = "", 0

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Once for each member of an object or a list, placed before it."""
        self.expect(opening)
        if self._peek() == closing:
            self.expect(closing)
            return
        while True:
            yield
            if self._peek() != ",":
                self.expect(closing)
                return
            self.expect(",")

    def expect(self, character: str) -> None:
        """Go past a character; an empty one is the end."""
        if self._peek() != character:
            raise ValueError(f"expected {character or 'the end'!r}, found {self._peek()!r}")
        self._place += len(character)

    def value(self) -> Any:
        """The next value."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except ValueError:
                if not self._more():
                    raise
                continue
            # A number may go on in the next block.
            if self._text[end : end + 1] not in _IN_NUMBERS or not self._more():
                self._place = end
                return value

    def _peek(self) -> str:
        """The next character that is not space; empty at the end."""
        while True:
            rest = self._text[self._place : self._place + 256]
            self._place += len(rest) - len(rest.lstrip(" \t\r\n"))
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _more(self) -> bool:
        block = next(self._blocks, None)
        if block is None:
            return False
        self._text, self._place = self._text[self._place :] + block, 0
        return True
