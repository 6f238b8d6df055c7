"""Held-out beginnings, and what a model makes of them.

In: held-out rows, a model and a seed. Out: beginnings with the human continuation, and one continuation a model, drawn
from its whole distribution. The random numbers of a continuation are a function of the seed and its beginning alone:
two models that continue the same beginning are given the same ones, whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.errors import HoldoutEmpty
from softshard.evaluate.text import text_after
from softshard.models import Tokenizer
from softshard.shard.read import Row
from softshard.shard.schema import PartMetadata
from softshard.sketch.types import TokenSequence

__all__ = ["Continuations", "Prompt", "Samples", "generate", "human_continuations", "make_prompts"]

_LEAST_CONTINUATION = 8
_PROMPTS_AT_A_TIME = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The beginning of a held-out document."""

    sequence_id: str
    token_ids: tuple[int, ...]
    """The beginning, with the token that the tokenizer puts before a text, if it does."""
    human_continuation: tuple[int, ...]
    """The tokens that follow in the document, as many as are sampled at most; fewer where the document or its first
    window ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """What follows each prompt, in the order of the prompts, without the end-of-text token."""

    token_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A model's continuations, and the time they took."""

    continuations: Continuations
    num_ended: int
    """Continuations that the model itself brought to an end."""
    decode_seconds: float
    """Wall-clock time of all decoding steps but the first of each batch, which reads the prompts."""
    num_sequence_steps: int
    """Over those steps, the sum of the sequences in the batch; one that has ended stays in it."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds a sequence and decoding step: forward pass and draw, shared by the sequences of the batch.

        0 where there was no such step, because every continuation ended with its first token.
        """
        return 1000 * self.decode_seconds / self.num_sequence_steps if self.num_sequence_steps else 0.0


def make_prompts(
    rows: Iterable[tuple[Row, PartMetadata]],
    *,
    num_samples: int,
    prompt_tokens: int,
    sample_tokens: int,
    seed: int,
) -> list[Prompt]:
    """At most `num_samples` beginnings, one per document, chosen and ordered by a hash of the seed and the sequence id.

    Only the window with which a document starts is taken, and only where at least 8 labels follow the beginning without
    a token of context between them.

    Raises:
        HoldoutEmpty: there is none.
    """
    beginnings = (
        sequence
        for (sequence, _), _ in rows
        if sequence.start == 0 and len(_labels_from(sequence, prompt_tokens)) >= _LEAST_CONTINUATION
    )
    chosen = heapq.nsmallest(num_samples, beginnings, key=lambda s: _digest(seed, "prompt", s.sequence_id))
    if not chosen:
        raise HoldoutEmpty(
            data="the test split of the targets",
            problem=f"no document has the {prompt_tokens} tokens of a beginning and {_LEAST_CONTINUATION} after it",
            remedy="lower `evaluate.prompt_tokens`, or add documents",
        )
    return [_prompt(sequence, prompt_tokens, sample_tokens) for sequence in chosen]


def _prompt(sequence: TokenSequence, prompt_tokens: int, sample_tokens: int) -> Prompt:
    return Prompt(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.token_ids[:prompt_tokens].tolist()),
        human_continuation=tuple(_labels_from(sequence, prompt_tokens)[:sample_tokens].tolist()),
    )


def _labels_from(sequence: TokenSequence, index: int) -> NDArray[np.int32]:
    """Ids of the labels that follow one another from a token on; none where that token is no label."""
    stop = next((stop for start, stop in sequence.label_spans if start <= index < stop), index)
    return sequence.token_ids[index:stop]


def human_continuations(prompts: Sequence[Prompt], *, tokenizer: Tokenizer) -> Continuations:
    """What the people wrote, in the form in which the models' continuations come."""
    return _continuations(prompts, [prompt.human_continuation for prompt in prompts], tokenizer)


def _continuations(prompts: Sequence[Prompt], each: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Continuations:
    """Cut each continuation before its first end-of-text token."""
    ids = [tuple(one[: one.index(tokenizer.eos_id)] if tokenizer.eos_id in one else one) for one in each]
    texts = [
        text_after(tokenizer, (*prompt.token_ids, *one), start=len(prompt.token_ids))
        for prompt, one in zip(prompts, ids, strict=True)
    ]
    return Continuations(token_ids=tuple(ids), texts=tuple(texts))


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer,
    sample_tokens: int,
    temperature: float,
    seed: int,
    device: str,
) -> Samples:
    """Continue every prompt by at most `sample_tokens` tokens, up to the end-of-text token.

    Ancestral sampling: each token is drawn from the whole distribution over the tokenizer's vocabulary at the given
    temperature, by its inverse, in float64. In float32 a batch changes a model's logits in the last bits alone; where
    that decides a draw, a continuation may differ with what else is in the batch.
    """
    drawn: list[list[int]] = []
    seconds, sequence_steps = 0.0, 0
    for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        batch = prompts[start : start + _PROMPTS_AT_A_TIME]
        uniforms = np.stack([_uniforms(seed, prompt.sequence_id, sample_tokens) for prompt in batch])
        decoding = _Decoding.of(model, [prompt.token_ids for prompt in batch], tokenizer, device)
        decoding.advance(uniforms[:, 0], temperature)
        began = time.perf_counter()
        for step in range(1, sample_tokens):
            if decoding.ended.all():
                break
            decoding.advance(uniforms[:, step], temperature)
            sequence_steps += len(batch)
        seconds += time.perf_counter() - began
        drawn.extend(decoding.drawn.tolist())
    continuations = _continuations(prompts, drawn, tokenizer)
    return Samples(
        continuations=continuations,
        num_ended=sum(tokenizer.eos_id in ids for ids in drawn),
        decode_seconds=seconds,
        num_sequence_steps=sequence_steps,
    )


@dataclass(slots=True, kw_only=True)
class _Decoding:
    """A batch in the course of decoding; prompts are padded on the left, so that all end at the same place."""

    model: Any
    tokenizer: Tokenizer
    input_ids: Tensor
    """[batch, new] tokens that the model has not read yet."""
    attention_mask: Tensor
    """[batch, length so far]"""
    cache: Any
    drawn: NDArray[np.int64]
    """[batch, steps] every token drawn so far."""
    ended: NDArray[np.bool_]
    """[batch] whether the end-of-text token was drawn."""

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, device: str) -> _Decoding:
        longest = max(len(ids) for ids in prompts)
        padding = [longest - len(ids) for ids in prompts]
        ids = [[tokenizer.eos_id] * pad + list(one) for pad, one in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        return cls(
            model=model,
            tokenizer=tokenizer,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            cache=None,
            drawn=np.zeros((len(prompts), 0), dtype=np.int64),
            ended=np.zeros(len(prompts), dtype=np.bool_),
        )

    def advance(self, uniforms: NDArray[np.float64], temperature: float) -> None:
        """Draw one token for each sequence of the batch."""
        logits = self.next_logits()[:, : self.tokenizer.vocab_size]
        tokens = _draw(logits.double() / temperature, torch.from_numpy(uniforms).to(logits.device))
        self.input_ids = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.input_ids)], dim=1)
        column = tokens.cpu().numpy()
        self.drawn = np.concatenate([self.drawn, column[:, None]], axis=1)
        self.ended = self.ended | (column == self.tokenizer.eos_id)

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """[batch, vocabulary] logits after all tokens so far."""
        positions = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        out = self.model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            position_ids=positions[:, -self.input_ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """[batch] the first token, by id, whose running probability is more than the uniform number."""
    running = torch.softmax(logits, dim=1).cumsum(dim=1)
    total = running[:, -1:]
    tokens = torch.searchsorted(running, uniforms[:, None] * total, right=True)
    last = torch.searchsorted(running, total.contiguous())
    return torch.minimum(tokens, last)[:, 0]


def _uniforms(seed: int, sequence_id: str, num: int) -> NDArray[np.float64]:
    key = np.frombuffer(_digest(seed, "sample", sequence_id), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key)).random(num)


def _digest(seed: int, purpose: str, sequence_id: str) -> bytes:
    return hashlib.blake2b(f"{purpose}:{seed}:{sequence_id}".encode(), digest_size=16).digest()
