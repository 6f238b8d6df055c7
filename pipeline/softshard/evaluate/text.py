"""The text of the last tokens of a sequence.

In: ids of a sequence and the index of the first token whose text is wanted. Out: text. The texts of consecutive pieces
concatenate to the text of the whole: a character that is split between two pieces belongs to the one that completes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from softshard.models import Tokenizer

__all__ = ["text_after"]

_REPLACEMENT = "\ufffd"


def text_after(tokenizer: Tokenizer, token_ids: Sequence[int], *, start: int) -> str:
    """Text of token_ids[start:], given the ids before them; an end-of-text token at the end has none.

    It is the decoded whole without the decoded ids before, so that tokenizers which treat the start of a text
    differently give the text that stands in the middle. Bytes of an incomplete character at the end are left out.
    """
    ids = list(token_ids)
    if len(ids) > start and ids[-1] == tokenizer.eos_id:
        ids.pop()
    before = tokenizer.decode(ids[:start]).rstrip(_REPLACEMENT) if start else ""
    return tokenizer.decode(ids).rstrip(_REPLACEMENT)[len(before) :] if ids else ""
