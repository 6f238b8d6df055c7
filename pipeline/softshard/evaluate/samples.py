"""Continuations of held-out beginnings: by the people who wrote them and by a model.

In: held-out rows, a model and a seed. Out: beginnings with the human continuation, and one continuation per model,
drawn from its whole distribution. The random numbers of a continuation depend only on the seed and its beginning,
so two models that continue the same beginning use the same numbers, whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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

_MIN_CONTINUATION = 8
_BATCH_PROMPTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The beginning of a held-out document: the first tokens of a text, or a conversation up to its first answer."""

    sequence_id: str
    token_ids: tuple[int, ...]
    """The beginning, including the BOS token if the tokenizer adds one."""
    human_continuation: tuple[int, ...]
    """The tokens that follow in the document: at most `sample_tokens`, fewer where the document or its first window
    ends, or the answer of a conversation."""
    end_id: int | None = None
    """The token that ends the answer of a conversation, beside the end-of-text token; None for a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """What follows each prompt, in the order of the prompts, without the end-of-text token."""

    token_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A model's continuations, and the time that decoding took."""

    continuations: Continuations
    num_ended: int
    """Continuations that the model itself ended, with the end-of-text token or that of an answer."""
    decode_seconds: float
    """Wall-clock time of all decoding steps but the first of each batch, which reads the prompts."""
    num_sequence_steps: int
    """Sum over those steps of the batch size; a sequence that has ended stays in the batch."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per sequence and decoding step (forward pass and draw); a batch shares the time of a step.

        0 if there was no such step, because every continuation ended with its first token.
        """
        return 1000 * self.decode_seconds / self.num_sequence_steps if self.num_sequence_steps else 0.0


def make_prompts(
    rows: Iterable[tuple[Row, PartMetadata]],
    *,
    num_samples: int,
    prompt_tokens: int,
    sample_tokens: int,
    seed: int,
    context_tokens: int | None = None,
) -> list[Prompt]:
    """At most `num_samples` beginnings, one per document, chosen and ordered by a hash of seed and sequence id.

    Only a document's first sequence is used. Of a text, only if at least 8 labels follow the beginning; of a
    conversation, only if `sample_tokens` more than what is before its first answer are within `context_tokens`.

    Raises:
        HoldoutEmpty: no document is long enough.
    """
    longest = np.inf if context_tokens is None else context_tokens - sample_tokens
    firsts = (sequence for (sequence, _), _ in rows if sequence.start == 0)
    prompts = (_answer_prompt(s, longest) if _is_answer(s) else _prompt(s, prompt_tokens) for s in firsts)
    found = (prompt for prompt in prompts if prompt is not None)
    chosen = heapq.nsmallest(num_samples, found, key=lambda prompt: _digest(seed, "prompt", prompt.sequence_id))
    if not chosen:
        raise HoldoutEmpty(
            data="the test split of the targets",
            problem=f"no document has the {prompt_tokens} tokens of a beginning and {_MIN_CONTINUATION} after it",
            remedy="lower `evaluate.prompt_tokens` (for conversations: `evaluate.sample_tokens`), or add documents",
        )
    return [replace(p, human_continuation=p.human_continuation[:sample_tokens]) for p in chosen]


def _is_answer(sequence: TokenSequence) -> bool:
    """Whether the first sequence of a document is of a conversation: every token of a text but the first is a label."""
    return sequence.label_spans[0][0] > 1


def _prompt(sequence: TokenSequence, prompt_tokens: int) -> Prompt | None:
    labels = _labels_from(sequence, prompt_tokens)
    if len(labels) < _MIN_CONTINUATION:
        return None
    return Prompt(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.token_ids[:prompt_tokens].tolist()),
        human_continuation=tuple(labels.tolist()),
    )


def _answer_prompt(sequence: TokenSequence, longest: float) -> Prompt | None:
    start, stop = sequence.label_spans[0]
    if start > longest:
        return None
    return Prompt(
        sequence_id=sequence.sequence_id,
        token_ids=tuple(sequence.token_ids[:start].tolist()),
        human_continuation=tuple(sequence.token_ids[start:stop].tolist()),
        end_id=int(sequence.token_ids[stop - 1]),
    )


def _labels_from(sequence: TokenSequence, index: int) -> NDArray[np.int32]:
    """Ids of the consecutive labels that start at `index`; empty if that token is not a label."""
    stop = next((stop for start, stop in sequence.label_spans if start <= index < stop), index)
    return sequence.token_ids[index:stop]


def human_continuations(prompts: Sequence[Prompt], *, tokenizer: Tokenizer) -> Continuations:
    """What people wrote, in the same form as the models' continuations."""
    return _continuations(prompts, [prompt.human_continuation for prompt in prompts], tokenizer)


def _continuations(
    prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Continuations:
    """Cut each continuation before its first end-of-text token, or that of its answer."""
    cut = [_before_end(ids, _ends(prompt, tokenizer)) for ids, prompt in zip(token_ids, prompts, strict=True)]
    texts = [
        text_after(tokenizer, (*prompt.token_ids, *ids), start=len(prompt.token_ids))
        for prompt, ids in zip(prompts, cut, strict=True)
    ]
    return Continuations(token_ids=tuple(cut), texts=tuple(texts))


def _before_end(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    return tuple(itertools.takewhile(lambda token_id: token_id not in ends, ids))


def _ends(prompt: Prompt, tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.eos_id} if prompt.end_id is None else {tokenizer.eos_id, prompt.end_id}


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
    temperature, by inverting its cumulative sum in float64. The composition of a batch changes a float32 model's logits
    in the last bits; where that decides a draw, a continuation depends on the rest of the batch.
    """
    drawn: list[list[int]] = []
    seconds, sequence_steps = 0.0, 0
    for start in range(0, len(prompts), _BATCH_PROMPTS):
        batch = prompts[start : start + _BATCH_PROMPTS]
        uniforms = np.stack([_uniforms(seed, prompt.sequence_id, sample_tokens) for prompt in batch])
        decoding = _Decoding.start(model, batch, tokenizer, device)
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
        num_ended=sum(not _ends(p, tokenizer).isdisjoint(ids) for p, ids in zip(prompts, drawn, strict=True)),
        decode_seconds=seconds,
        num_sequence_steps=sequence_steps,
    )


@dataclass(slots=True, kw_only=True)
class _Decoding:
    """The state of decoding one batch; prompts are padded on the left, so that all end at the same index."""

    model: Any
    tokenizer: Tokenizer
    input_ids: Tensor
    """[batch, new] tokens that the cache does not cover yet."""
    attention_mask: Tensor
    """[batch, length so far]"""
    cache: Any
    drawn: NDArray[np.int64]
    """[batch, steps] all tokens drawn so far."""
    ended: NDArray[np.bool_]
    """[batch] whether the end-of-text token was drawn, or that of the answer."""
    end_ids: NDArray[np.int64]
    """[batch] the token that ends the answer; the end-of-text token for a text."""

    @classmethod
    def start(cls, model: Any, prompts: Sequence[Prompt], tokenizer: Tokenizer, device: str) -> _Decoding:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        padding = [longest - len(prompt.token_ids) for prompt in prompts]
        ids = [[tokenizer.eos_id] * pad + list(prompt.token_ids) for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        ends = [tokenizer.eos_id if prompt.end_id is None else prompt.end_id for prompt in prompts]
        return cls(
            model=model,
            tokenizer=tokenizer,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            cache=None,
            drawn=np.zeros((len(prompts), 0), dtype=np.int64),
            ended=np.zeros(len(prompts), dtype=np.bool_),
            end_ids=np.array(ends, np.int64),
        )

    def advance(self, uniforms: NDArray[np.float64], temperature: float) -> None:
        """Draw one token for each sequence of the batch."""
        logits = self.next_logits()[:, : self.tokenizer.vocab_size]
        tokens = _draw(logits.double() / temperature, torch.from_numpy(uniforms).to(logits.device))
        self.input_ids = tokens[:, None]
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.input_ids)], dim=1)
        column = tokens.cpu().numpy()
        self.drawn = np.concatenate([self.drawn, column[:, None]], axis=1)
        self.ended = self.ended | (column == self.tokenizer.eos_id) | (column == self.end_ids)

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
