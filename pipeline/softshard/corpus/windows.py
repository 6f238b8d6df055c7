"""Cuts the token ids of a document into windows, its sequences.

T is the document's tokens: the BOS if the tokenizer has one, the ids of its text, the EOS. Every token of T but the
first is the label of exactly one window. A BOS is never a label, the EOS is the last label, and no window spans two
documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.corpus.screen import ScreenedDocument
from softshard.models import Tokenizer
from softshard.sketch.types import TokenSequence

__all__ = ["document_windows", "make_sequence_id", "num_document_tokens", "num_windows", "window_starts"]


def num_document_tokens(token_ids: NDArray[Any], *, tokenizer: Tokenizer) -> int:
    """Length of T."""
    return len(token_ids) + 1 + (tokenizer.bos_id is not None)


def _document_tokens(token_ids: NDArray[Any], *, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """T, [len(token_ids) + 1, or + 2 with a BOS]."""
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate(
        [np.array(opening, np.int32), token_ids.astype(np.int32), np.array([tokenizer.eos_id], np.int32)]
    )


def num_windows(num_tokens: int, *, context_tokens: int, overlap_tokens: int) -> int:
    """Number of windows of a document of `num_tokens` tokens including BOS and EOS; 0 without a label."""
    if num_tokens < 2:
        return 0
    beyond = max(0, num_tokens - context_tokens)
    return 1 + -(-beyond // (context_tokens - overlap_tokens))


def window_starts(num_tokens: int, *, context_tokens: int, overlap_tokens: int) -> range:
    """Start positions of the windows of a document of `num_tokens` tokens including BOS and EOS."""
    step = context_tokens - overlap_tokens
    count = num_windows(num_tokens, context_tokens=context_tokens, overlap_tokens=overlap_tokens)
    return range(0, count * step, step)


def make_sequence_id(
    document_id: str,
    *,
    tokenizer: Tokenizer,
    start: int,
    context_tokens: int,
    overlap_tokens: int,
    rendering: str | None = None,
) -> str:
    """blake2b-128, in hex, of document, tokenizer fingerprint, start, context and overlap, one per line.

    For a conversation, `rendering` follows them: a digest of its tokens and labels, which its template decides.
    """
    parts = [document_id, tokenizer.fingerprint, start, context_tokens, overlap_tokens]
    parts += [] if rendering is None else [rendering]
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def document_windows(
    document: ScreenedDocument,
    *,
    token_ids: NDArray[Any],
    tokenizer: Tokenizer,
    context_tokens: int,
    overlap_tokens: int,
) -> Iterator[TokenSequence]:
    """Sequences of a document, given the ids of its text without special tokens.

    Window k holds T[s : s + context] with s = k * (context - overlap); its first label is 1 in window 0 and `overlap`
    in the others. The window that reaches the end of T is the last. A document without a label gives none.
    """
    tokens = _document_tokens(token_ids, tokenizer=tokenizer)
    for start in window_starts(len(tokens), context_tokens=context_tokens, overlap_tokens=overlap_tokens):
        # A view would keep the tokens of the whole document in memory while one of its windows waits.
        own = tokens[start : start + context_tokens].copy()
        yield TokenSequence(
            sequence_id=make_sequence_id(
                document.document_id,
                tokenizer=tokenizer,
                start=start,
                context_tokens=context_tokens,
                overlap_tokens=overlap_tokens,
            ),
            document_id=document.document_id,
            source=document.source,
            style=document.style,
            group=document.group,
            start=start,
            token_ids=own,
            label_spans=((overlap_tokens if start else 1, len(own)),),
        )
