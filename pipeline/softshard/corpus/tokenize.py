"""Tokenises texts in memory that does not grow with the longest document.

A tokenizer needs about 160 bytes for each byte of a text that is tokenised at once, so a long text is tokenised in
pieces. A piece is tokenised behind a little of the text before it, whose ids are then left out: tokenizers of the
SentencePiece kind mark the beginning of whatever they are given. The text is cut only where that does not show:

- the ids of the text before the cut are the beginning of the ids of the text around it, which is checked;
- for a tokenizer that divides no text into words (Llama 2, Mistral), no token of the vocabulary contains the two
  characters around the cut. No merge can then cross it, however far its effects reach, so the ids are those of the
  whole text. Other tokenizers divide the text by what is close by, and the check sees that.

A stretch of text without such a place is tokenised at once. In prose there is one at nearly every end of a word; there
is none in millions of equal characters, for which `corpus.max_document_bytes` bounds the memory.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

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
    pieces: list[NDArray[np.int32]] = []
    for start, stop in itertools.pairwise(cuts):
        begin = max(0, start - _CONTEXT_CHARACTERS)
        before, together = tokenizer.encode([text[begin:start], text[begin:stop]])
        if together[: len(before)] != before:
            # What comes later in the piece reaches back over the cut, unseen by the check of what is close by.
            return np.array(tokenizer.encode([text])[0], dtype=np.int32)
        pieces.append(np.array(together[len(before) :], dtype=np.int32))
    return np.concatenate(pieces)


def _find_cuts(text: str, tokenizer: Tokenizer, piece_characters: int) -> Iterator[int]:
    """Places where a text can be cut, at least a piece apart; the first few candidates in each piece are tried."""
    start = piece_characters
    while start < len(text) - piece_characters:
        candidates = itertools.islice(_candidates(text, start, start + piece_characters, tokenizer), _MAX_TRIES)
        cut = next((place for place in candidates if _is_safe_cut(text, place, tokenizer)), None)
        if cut is not None:
            yield cut
        start = (start if cut is None else cut) + piece_characters


def _candidates(text: str, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[int]:
    """Ends of words; with a tokenizer of no words, those that no token contains, and then all such places."""
    ends = (place.start() for place in _AFTER_WORD.finditer(text, start, stop))
    joined = _joined_pairs(tokenizer.backend)
    if joined is None:
        return ends
    return (place for place in itertools.chain(ends, range(start, stop)) if _pair_at(text, place) not in joined)


def _pair_at(text: str, place: int) -> str:
    """The characters around a place, with marks as spaces."""
    return text[place - 1 : place + 1].replace("▁", " ")


def _is_safe_cut(text: str, place: int, tokenizer: Tokenizer) -> bool:
    before, after = text[max(0, place - _CONTEXT_CHARACTERS) : place], text[place : place + _CONTEXT_CHARACTERS]
    together, left = tokenizer.encode([before + after, before])
    return together[: len(left)] == left


@lru_cache(maxsize=2)
def _joined_pairs(backend: Any) -> frozenset[str] | None:
    """All pairs of characters that stand together in some token, for a tokenizer that divides no text into words.

    None for every other tokenizer, and for one that changes more of a text than its spaces, or has no token for some
    characters: how it deals with two of those in a row depends on both.
    """
    definition = json.loads(backend.backend_tokenizer.to_str())
    model = definition["model"]
    is_plain = all(map(_changes_spaces_alone, _steps(definition["normalizer"], "normalizers")))
    is_whole = all(map(_divides_nothing, _steps(definition["pre_tokenizer"], "pretokenizers")))
    if not (is_plain and is_whole and model["type"] == "BPE" and model.get("byte_fallback")):
        return None
    tokens = (token.replace("▁", " ") for token in backend.get_vocab())
    return frozenset(pair for token in tokens for pair in map("".join, itertools.pairwise(token)))


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for outer in step[name] for inner in _steps(outer, name)] if step["type"] == "Sequence" else [step]


def _changes_spaces_alone(step: dict[str, Any]) -> bool:
    """Whether a normalizer puts a mark before the text, or marks in place of spaces."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == "▁")
    return bool(step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁")


def _divides_nothing(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves a text whole: one that marks spaces, or that divides at spaces after these."""
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == "▁" and not step.get("split", True))
    return bool(step["type"] == "Split" and step["pattern"] == {"String": " "})
