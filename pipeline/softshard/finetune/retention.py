"""The loss on other data that preserves what the model knew.

In: batches of text outside the style. Out: a mean loss per label, which the training step multiplies by lambda and adds
to the loss on the targets. Cross-entropy on the corpus's own tokens would not be retention but another alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from softshard.data.batch import Batch
from softshard.data.text import BatchSource
from softshard.finetune.hidden_states import hidden_states
from softshard.finetune.loss import dense_kl
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.models.decoder import Decoder

if TYPE_CHECKING:
    from peft import PeftModel

    from softshard.finetune.adapters.output import OutputAdapted

__all__ = ["Retention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The retention loss of a training step."""

    batches: BatchSource
    """One batch is taken per step."""
    weight: float
    """Retention weight lambda."""
    objective: Literal["kl", "ce"]
    """`kl`: KL(base || model) over the whole vocabulary, the base being the same model without its adapter;
    `ce`: cross-entropy on the text."""

    def loss(
        self, model: PeftModel | OutputAdapted, decoder: Decoder, batch: Batch, *, num_valid: int, chunk_positions: int
    ) -> Tensor:
        """Mean loss per label, in nats, not multiplied by lambda; `batch` is on the model's device."""
        if self.objective == "ce":
            return CROSS_ENTROPY.loss(decoder, batch, num_valid=num_valid, chunk_positions=chunk_positions)
        with torch.no_grad(), model.disable_adapter():
            base = hidden_states(decoder, batch)
        hidden, low_rank = decoder.adapted(hidden_states(decoder, batch))
        total = dense_kl(
            hidden,
            base,
            decoder.weight,
            num_valid=num_valid,
            chunk_positions=chunk_positions,
            bias=decoder.bias,
            position_weights=batch.position_weights,
            transform=decoder.transform,
            low_rank=low_rank,
        )
        return total / batch.targets.mean_divisor
