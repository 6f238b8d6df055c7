"""Tokenizers: loaded, identified by a fingerprint, compared with the tokenizer that data was made with.

A tokenizer's fingerprint and vocabulary size are stored with all data that is made with it, and are compared wherever
data meets a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from softshard.errors import ModelInvalid, TokenizerMismatch

__all__ = ["Tokenizer", "check_tokenizer", "load_tokenizer", "wrap_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with the values that data and models must agree on."""

    backend: Any
    """The tokenizer of transformers."""
    fingerprint: str
    """SHA-256, in hex, of its whole definition and of the ids that begin and end a document."""
    vocab_size: int
    """Number of its tokens; logits beyond them are padding."""
    bos_id: int | None
    """Token that the tokenizer puts before a text; None where it puts none."""
    eos_id: int
    """Token that ends a document."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. Texts are never truncated, and the spelling of a special token stays plain text."""
        core = self.backend.backend_tokenizer
        # A call of transformers sets these for itself, and leaves them as they were in its last call.
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        # Without the offsets of each token, which transformers computes too, this takes a quarter less time.
        return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of some ids."""
        text: str = self.backend.decode(ids, clean_up_tokenization_spaces=False)
        return text


@lru_cache(maxsize=8)
def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the fast tokenizer of a model folder.

    Raises:
        ModelInvalid: there is none, it is not a fast one, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalid(model=str(folder), problem=f"the tokenizer cannot be loaded: {error}") from error
    tokenizer = wrap_tokenizer(backend, name=str(folder))
    backend.model_max_length = 10**30
    return tokenizer


def wrap_tokenizer(backend: Any, *, name: str) -> Tokenizer:
    """A tokenizer of transformers with its fingerprint.

    Raises:
        ModelInvalid: it is not a fast one, or it has no end-of-text token.
    """
    if not backend.is_fast:
        raise ModelInvalid(model=name, problem="the tokenizer has no fast form (tokenizer.json)")
    if backend.eos_token_id is None:
        raise ModelInvalid(model=name, problem="the tokenizer has no end-of-text token to close a document with")
    opening = backend("a")["input_ids"]
    bos = backend.bos_token_id
    bos_id = bos if bos is not None and opening[:1] == [bos] else None
    definition = json.loads(backend.backend_tokenizer.to_str())
    definition.pop("truncation", None)
    definition.pop("padding", None)
    parts = [definition, bos_id, backend.eos_token_id]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Tokenizer(
        backend=backend,
        fingerprint=fingerprint,
        vocab_size=len(backend),
        bos_id=bos_id,
        eos_id=backend.eos_token_id,
    )


def check_tokenizer(tokenizer: Tokenizer, *, model: str, data: str, data_fingerprint: str) -> None:
    """Refuse a model whose tokenizer is not the data's. Raises TokenizerMismatch."""
    if tokenizer.fingerprint != data_fingerprint:
        raise TokenizerMismatch(
            data=data, data_fingerprint=data_fingerprint, model=model, model_fingerprint=tokenizer.fingerprint
        )
