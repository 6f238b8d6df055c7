"""A student for targets made by hand: two layers, and more logits than the data has tokens."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softshard.finetune.adapters.kinds import attach_adapter
from softshard.models import load_model


def student(*, dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(folder, kind, shape, *, dtype=torch.float32):
    """A model from a folder with an adapter as some training might leave it, in evaluation mode."""
    return randomised(attach_adapter(load_model(folder, dtype=dtype, device="cpu"), kind, shape, seed=0), 0.05).eval()


def randomised(model, scale):
    """All trainable weights moved away from where a new adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
