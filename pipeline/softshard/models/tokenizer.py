"""Tokenizers: loaded, identified by a fingerprint, compared with the tokenizer that data was made with.

A tokenizer's fingerprint and vocabulary size are stored with all data that is made with it, and are compared wherever
data meets a model. What counts is that the stored ids mean the same: a model's tokenizer may end documents with another
token, or have some added tokens more or fewer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from softshard.errors import ModelInvalid, TokenizerMismatch
from softshard.models.folder import output_size

__all__ = ["Tokenizer", "check_tokenizer", "load_tokenizer", "wrap_tokenizer"]

_MOST_ADDED = 64
"""A tokenizer with this many added tokens more than the data's is still recognised by the data's fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with the values that data and models must agree on."""

    backend: Any
    """The tokenizer of transformers."""
    fingerprint: str
    """SHA-256, in hex, of its whole definition and of the ids that begin and end a document."""
    vocab_size: int
    """Number of its tokens that a model has logits for; logits beyond them are padding. Tokens beyond the logits, which
    can only be added ones, are in no text."""
    bos_id: int | None
    """Token that the tokenizer puts before a text; None where it puts none."""
    eos_id: int
    """Token that ends a document."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. Texts are never truncated, and the spelling of a special token stays plain text.

        Raises:
            ModelInvalid: a text has a token that the model has no logit for.
        """
        core = self.backend.backend_tokenizer
        # A call of transformers sets these for itself, and leaves them as they were in its last call.
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        # Without the offsets of each token, which transformers computes too, this takes a quarter less time.
        ids = [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]
        if len(self.backend) > self.vocab_size:
            self._refuse_unknown(ids)
        return ids

    def encode_rendered(self, text: str, *, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the text of a chat template, and the place of each token in it as (start, stop).

        Args:
            text: of any length; nothing is put before or after it.
            special: whether special tokens that it spells are such; else they are plain text, as for `encode`.

        Raises:
            ModelInvalid: as for `encode`.
        """
        core = self.backend.backend_tokenizer
        core.encode_special_tokens = not special
        core.no_truncation()
        core.no_padding()
        encoding = core.encode(text, add_special_tokens=False)
        if len(self.backend) > self.vocab_size:
            self._refuse_unknown([encoding.ids])
        return encoding.ids, encoding.offsets

    def _refuse_unknown(self, ids: list[list[int]]) -> None:
        highest = max((max(text) for text in ids if text), default=0)
        if highest >= self.vocab_size:
            problem = (
                f"the text has its token {self.token(highest)!r} with the id {highest}, and it has logits for"
                f" {self.vocab_size} tokens; remove it from the text, or use another model"
            )
            raise ModelInvalid(model=str(self.backend.name_or_path), problem=problem)

    def token(self, token_id: int) -> str | None:
        """How the tokenizer writes a token; None for an id that it does not have."""
        token: str | None = self.backend.convert_ids_to_tokens(token_id) if token_id < len(self.backend) else None
        return token

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
    return _limited(tokenizer, output_size(folder), name=str(folder))


def _limited(tokenizer: Tokenizer, num_logits: int, *, name: str) -> Tokenizer:
    """The tokenizer without added tokens that the model has no logits for, as long as no text can need them.

    Raises ModelInvalid where a document could not be begun or ended.
    """
    missing = range(num_logits, tokenizer.vocab_size)
    if not missing or not set(missing) <= set(tokenizer.backend.added_tokens_decoder):
        return tokenizer
    for token_id, use in ((tokenizer.bos_id, "begins"), (tokenizer.eos_id, "ends")):
        if token_id is not None and token_id in missing:
            problem = f"{tokenizer.token(token_id)!r}, which {use} a document, has the id {token_id}"
            raise ModelInvalid(model=name, problem=f"{problem}, and the model has logits for {num_logits} tokens")
    return replace(tokenizer, vocab_size=num_logits)


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
    return Tokenizer(
        backend=backend,
        fingerprint=_Fingerprints(_definition(backend)).of(bos_id, backend.eos_token_id),
        vocab_size=len(backend),
        bos_id=bos_id,
        eos_id=backend.eos_token_id,
    )


def _definition(backend: Any) -> dict[str, Any]:
    """All of tokenizer.json that can change an id."""
    definition: dict[str, Any] = json.loads(backend.backend_tokenizer.to_str())
    definition.pop("truncation", None)
    definition.pop("padding", None)
    return definition


class _Fingerprints:
    """Fingerprints of one definition with any ids that begin and end a document; the long part is hashed once."""

    def __init__(self, definition: dict[str, Any]) -> None:
        others = {name: value for name, value in definition.items() if name != "added_tokens"}
        self._others = _json(others).removeprefix("{")
        self.added_tokens: list[dict[str, Any]] = definition["added_tokens"]
        self._begin(self.added_tokens)

    def _begin(self, added_tokens: list[dict[str, Any]]) -> None:
        # The JSON of the whole definition, whose keys are sorted, without making the long part of it again.
        text = f'[{{"added_tokens": {_json(added_tokens)}, {self._others}, '
        self._begun = hashlib.sha256(text.encode())

    def without_last(self, num: int) -> None:
        """From now on, leave out the added tokens with the highest ids."""
        last = sorted(token["id"] for token in self.added_tokens)[len(self.added_tokens) - num :]
        self._begin([token for token in self.added_tokens if token["id"] not in last])

    def of(self, bos_id: int | None, eos_id: int) -> str:
        """SHA-256, in hex, of the JSON list of definition, BOS and EOS."""
        whole = self._begun.copy()
        whole.update(f"{_json(bos_id)}, {_json(eos_id)}]".encode())
        return whole.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def check_tokenizer(
    tokenizer: Tokenizer, *, model: str, data: str, data_fingerprint: str, made_with: Tokenizer | None = None
) -> None:
    """Refuse a model whose tokenizer gives the ids of the data another meaning.

    Args:
        tokenizer: the model's.
        model: its name, for errors.
        data: name of the data.
        data_fingerprint: of the tokenizer that the data was made with.
        made_with: that tokenizer, where it is at hand. Without it, a tokenizer is recognised that differs in the ids
            that begin and end a document, or has added tokens beyond those of the data.

    Raises:
        TokenizerMismatch: it does; the error names the first token that differs, where that is known.
    """
    if data_fingerprint == tokenizer.fingerprint:
        return
    difference = None
    if made_with is not None and made_with.fingerprint == data_fingerprint:
        difference = _difference(made_with, tokenizer)
        if difference is None:
            return
    elif data_fingerprint in _equivalents(tokenizer):
        return
    raise TokenizerMismatch(
        data=data,
        data_fingerprint=data_fingerprint,
        model=model,
        model_fingerprint=tokenizer.fingerprint,
        difference=difference,
    )


def _difference(data: Tokenizer, model: Tokenizer) -> str | None:
    """The first id of the data's vocabulary that means something else to the model's tokenizer, in words.

    An added token of the data that the model's tokenizer lacks is no difference unless it begins or ends documents.
    """
    theirs = data.backend.convert_ids_to_tokens(list(range(data.vocab_size)))
    num = min(data.vocab_size, len(model.backend))
    ours = [*model.backend.convert_ids_to_tokens(list(range(num))), *[None] * (data.vocab_size - num)]
    may_lack = set(data.backend.added_tokens_decoder) - {data.bos_id, data.eos_id}
    for token_id, (its, own) in enumerate(zip(theirs, ours, strict=True)):
        if its != own and not (own is None and token_id in may_lack):
            here = "no token" if own is None else repr(own)
            return f"id {token_id} is {its!r} in the data and {here} in the model"
    decoders = [_definition(each.backend).get("decoder") for each in (data, model)]
    if decoders[0] != decoders[1]:
        return "equal tokens are turned into text in different ways"
    return None


def _equivalents(tokenizer: Tokenizer) -> Iterator[str]:
    """Fingerprints of data whose ids mean the same to a tokenizer: other ends, or fewer added tokens."""
    fingerprints = _Fingerprints(_definition(tokenizer.backend))
    added = sorted(token["id"] for token in fingerprints.added_tokens)
    for num_fewer in range(min(_MOST_ADDED, len(added)) + 1):
        kept = added[: len(added) - num_fewer]
        if num_fewer:
            fingerprints.without_last(num_fewer)
        # With all tokens, each may begin documents; with fewer, those that the tokenizer has itself, or none.
        begins = [None, *kept] if num_fewer == 0 else {None, tokenizer.bos_id}
        yield from (fingerprints.of(*ends) for ends in itertools.product(begins, kept))
