"""Losses of a language model from its hidden states and its output matrix, without the logits of all positions.

hidden states, output matrix ──► chunks of logits ──► loss of a target ──► slopes of the logits ──► gradients of both

`projection` loops over the chunks and knows nothing of targets. For the loss and the slopes of a chunk it calls
`forward_kl`, one of `divergences` (reverse KL, Jensen-Shannon) or `dense` (KL to a frozen base). `entries` cuts sparse
targets into chunks; `buckets` is a softmax over some tokens, one bucket each, and a last bucket with all the others.
`sparse` has the public functions.
"""

from __future__ import annotations

from softshard.finetune.loss.dense import dense_kl
from softshard.finetune.loss.sparse import sparse_divergence, sparse_kl

__all__ = ["dense_kl", "sparse_divergence", "sparse_kl"]
