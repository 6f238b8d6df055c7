"""Reads a JSON object that holds one long list, with one item of the list in memory at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

__all__ = ["read_json_items"]

_BLOCK_BYTES = 2**18
_IN_NUMBERS = {"", *"0123456789.eE+-"}


def read_json_items(file: BinaryIO, *, name: str, on_item: Callable[[Any], None]) -> dict[str, Any]:
    """Read a JSON object in any layout; call `on_item` for each item of one list, and return the other members.

    Args:
        file: open for reading.
        name: key of the list.
        on_item: takes the items in their order.

    Raises:
        ValueError: the content is not JSON or not an object, or the member `name` is not a list.
    """
    scanner = _Scanner(file)
    members: dict[str, Any] = {}
    for _ in scanner.members("{", "}"):
        key = scanner.value()
        scanner.expect(":")
        if key != name:
            members[key] = scanner.value()
            continue
        for _ in scanner.members("[", "]"):
            on_item(scanner.value())
    scanner.expect("")
    return members


class _Scanner:
    """Reads JSON values from a file block by block."""

    def __init__(self, file: BinaryIO) -> None:
        self._blocks = codecs.iterdecode(iter(lambda: file.read(_BLOCK_BYTES), b""), "utf-8")
        self._decoder = json.JSONDecoder()
        self._text, self._place = "", 0

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Yield once before each member of an object or a list, with the scanner placed at the member."""
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
        """Skip a character; the empty string means the end of the file."""
        if self._peek() != character:
            raise ValueError(f"expected {character or 'the end'!r}, found {self._peek()!r}")
        self._place += len(character)

    def value(self) -> Any:
        """Read the next value."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except ValueError:
                if not self._more():
                    raise
                continue
            # A number may continue in the next block.
            if self._text[end : end + 1] not in _IN_NUMBERS or not self._more():
                self._place = end
                return value

    def _peek(self) -> str:
        """The next character that is not whitespace, or the empty string at the end."""
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
