"""Losses of a language model from its hidden states and its output matrix, without the logits of all positions.

hidden states, output matrix ──► chunks of logits ──► loss of a target ──► slopes of the logits ──► gradients of both

`projection` goes over the chunks and knows nothing of targets; `sparse` (forward KL), `coarse` (reverse KL and
Jensen-Shannon) and `dense` (KL to a frozen base) are what it asks for a chunk's loss and slopes. `entries` are a sparse
target's; `cells` is a softmax in which some tokens stand alone and all others together.
"""

from __future__ import annotations

from softshard.finetune.loss.dense import dense_kl
from softshard.finetune.loss.divergences import Divergence, sparse_divergence
from softshard.finetune.loss.sparse import sparse_kl

__all__ = ["Divergence", "dense_kl", "sparse_divergence", "sparse_kl"]
