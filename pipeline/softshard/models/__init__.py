"""Causal language models and tokenizers: found, checked, identified by digest, loaded; models as body and output.

Import `softshard.models.decoder` by its full name: it needs torch, and this package loads without it.
"""

from __future__ import annotations

from softshard.models.device import (
    check_device,
    device_failed,
    out_of_memory,
    peak_memory,
    release_memory,
    resolve_device,
    resolve_dtype,
)
from softshard.models.folder import (
    check_context,
    check_packages,
    check_vocabulary,
    check_weights,
    num_weights,
    output_size,
    read_architecture,
    resolve_model,
    weights_digest,
)
from softshard.models.loading import expert_share, load_empty_model, load_model
from softshard.models.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, wrap_tokenizer

__all__ = [
    "Tokenizer",
    "check_context",
    "check_device",
    "check_packages",
    "check_tokenizer",
    "check_vocabulary",
    "check_weights",
    "device_failed",
    "expert_share",
    "load_empty_model",
    "load_model",
    "load_tokenizer",
    "num_weights",
    "out_of_memory",
    "output_size",
    "peak_memory",
    "read_architecture",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "weights_digest",
    "wrap_tokenizer",
]
