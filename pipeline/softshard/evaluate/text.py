"""Token ids to the text that some of them stand for.

In: ids of a sequence and the index from which on they count. Out: text, so that the texts of consecutive pieces, put
together, are the text of the whole: a character that is split between two pieces belongs to the one that completes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from softshard.models import Tokenizer

__all__ = ["text_after"]

_REPLACEMENT = "\ufffd"


def text_after(tokenizer: Tokenizer, token_ids: Sequence[int], *, start: int) -> str:
    """Text of token_ids[start:], given the ids before them; an end-of-text token at the end has none.

    It is what decoding the whole adds to decoding the ids before, so that tokenizers which treat a beginning apart
    give the same text here as in the middle. Bytes of a character that stays incomplete at the end are left out.
    """
    ids = list(token_ids)
    if len(ids) > start and ids[-1] == tokenizer.eos_id:
        ids.pop()
    before = tokenizer.decode(ids[:start]).rstrip(_REPLACEMENT) if start else ""
    return tokenizer.decode(ids).rstrip(_REPLACEMENT)[len(before) :] if ids else ""
