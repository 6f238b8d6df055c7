"""Tiny random decoders of several families, sequences for them, and their distributions by a direct forward pass."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from softshard.config import TeacherSettings, VllmSettings
from softshard.sketch.types import TokenSequence
from softshard.teacher.engines import open_teacher, teacher_identity

VOCAB = 300
PADDED = 320
CONTEXT = 96

_SHAPE = {
    "vocab_size": PADDED,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_PER_HEAD = {"head_dim": 32, "query_pre_attn_scalar": 32}
_GPT2 = {"vocab_size": PADDED, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.3}

FAMILIES = {
    "Llama": {**_SHAPE, "tie_word_embeddings": False},
    "Qwen2": {**_SHAPE, "tie_word_embeddings": True},
    "Qwen3": {**_SHAPE, "head_dim": 32},
    "Gemma2": {**_SHAPE, **_PER_HEAD, "final_logit_softcapping": 6.0, "attn_logit_softcapping": 20.0},
    "Phi": {**_SHAPE, "num_key_value_heads": 2},
    "Olmo2": {**_SHAPE, "num_key_value_heads": 2},
    "GPT2": {**_GPT2, "bos_token_id": None, "eos_token_id": 0},
}


def save_decoder(folder, family, *, seed=0):
    """A random model of a family; its last 20 logits stand for no token and are large."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] *= 3
    model.save_pretrained(folder)
    return folder


SPANS = (((2, 6), (30, 40)), ((1, 7),), ((1, 2),), ((1, 3), (14, 20), (31, 34), (60, 90)), ((22, 23),), ((5, 61),))
"""Labels of `some_sequences` with context between them: within a chunk, across pieces, and pieces without any."""


def some_sequences(lengths=(40, 7, 2, 90, 23, 61), *, first_labels=None, spans=None, seed=0):
    generator = np.random.default_rng(seed)
    return [
        TokenSequence(
            sequence_id=f"{seed}-{index:030d}",
            document_id=f"{index:032d}",
            source="s",
            style="s",
            group="g",
            start=0,
            token_ids=generator.integers(0, VOCAB, length).astype(np.int32),
            label_spans=spans[index] if spans else (((first_labels or [1] * len(lengths))[index], length),),
        )
        for index, length in enumerate(lengths)
    ]


def open_vllm(folder, *, adapters=(), weights="w", digests=(), vocab_size=VOCAB, context=CONTEXT, **options):
    settings = TeacherSettings(model="m", engine="vllm", device="cpu", vllm=VllmSettings(kv_cache_gib=0.25, **options))
    identity = teacher_identity(settings, context_tokens=context, weights=weights, adapters=list(digests))
    return open_teacher(folder, adapters=adapters, identity=identity, device="cpu", vocab_size=vocab_size)


def direct_logprobs(folder, sequences, *, vocab_size=VOCAB):
    """[labels, vocab_size] float64 log-probabilities of each sequence, by a forward pass over it alone."""
    # The other implementations leave out Gemma 2's cap on attention scores.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, :vocab_size]
        found.append(torch.log_softmax(logits[sequence.positions].double(), -1).numpy())
    return found


def dense(targets, *, vocab_size=VOCAB):
    """[labels, vocab_size] log-probabilities of a `full` sketch, before it is stored."""
    logprobs = np.full((targets.num_labels, vocab_size), -np.inf)
    rows = np.repeat(np.arange(targets.num_labels), targets.head_count)
    logprobs[rows, targets.head_ids] = targets.head_logprobs
    return logprobs


def drawn(targets):
    """Each entry of a tail as one number: its label, its draw and its token."""
    return np.repeat(np.arange(len(targets.tail_count)), targets.tail_count) * 2**20 + targets.tail_ids
