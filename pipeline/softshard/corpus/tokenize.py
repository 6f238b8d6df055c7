"""Tokenises texts in memory that does not grow with the longest document.

A tokenizer needs about 160 bytes for each byte of a text that is tokenised at once, so a long text is tokenised in
pieces. A text is cut only where both sides, tokenised separately, give the same ids as together, which is checked on
the text around the cut. The ids are those of the whole text if no token depends on text further away than that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from softshard.models import Tokenizer

__all__ = ["encode_texts"]

_PIECE_CHARACTERS = 2**18
_CONTEXT_CHARACTERS = 256
_MAX_TRIES = 32
_AFTER_WORD = re.compile(r"(?<=\w)\W")


def encode_texts(
    texts: list[str], *, tokenizer: Tokenizer, piece_characters: int = _PIECE_CHARACTERS
) -> list[NDArray[np.int32]]:
    """Ids of each text, without special tokens; texts of more than two pieces are tokenised piece by piece."""
    short = [text for text in texts if len(text) <= 2 * piece_characters]
    encoded = iter(tokenizer.encode(short))
    return [
        np.array(next(encoded), dtype=np.int32)
        if len(text) <= 2 * piece_characters
        else _encode_long(text, tokenizer, piece_characters)
        for text in texts
    ]


def _encode_long(text: str, tokenizer: Tokenizer, piece_characters: int) -> NDArray[np.int32]:
    cuts = [0, *_find_cuts(text, tokenizer, piece_characters), len(text)]
    pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
    return np.concatenate([np.array(tokenizer.encode([piece])[0], dtype=np.int32) for piece in pieces])


def _find_cuts(text: str, tokenizer: Tokenizer, piece_characters: int) -> Iterator[int]:
    """Places where a text can be cut, at least a piece apart; the first few ends of words in each piece are tried."""
    start = piece_characters
    while start < len(text) - piece_characters:
        found = itertools.islice(_AFTER_WORD.finditer(text, start, start + piece_characters), _MAX_TRIES)
        cut = next((place.start() for place in found if _is_safe_cut(text, place.start(), tokenizer)), None)
        if cut is not None:
            yield cut
        start = (start if cut is None else cut) + piece_characters


def _is_safe_cut(text: str, place: int, tokenizer: Tokenizer) -> bool:
    before, after = text[max(0, place - _CONTEXT_CHARACTERS) : place], text[place : place + _CONTEXT_CHARACTERS]
    together, left, right = tokenizer.encode([before + after, before, after])
    return together == left + right
