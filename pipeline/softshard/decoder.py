"""A causal language model as its body and its output layer, so that nobody need hold all logits at once.

In: a model of transformers, with adapters or without, and sequences. Out: hidden states at the position before each
label, and the logits of as many of them as are asked for. A model that does anything else to its logits, such as to
scale or cap them, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softshard.errors import ModelInvalid
from softshard.target.types import TokenSequence

__all__ = ["Decoder", "batches_by_length"]

_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Logits of a position are `weight @ hidden + bias`."""

    body: nn.Module
    """Everything before the output layer, the last norm included; adapters on its layers stay in force."""
    weight: Tensor
    """[V, d]"""
    bias: Tensor | None
    """[V]"""

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """Halves of a causal language model, or of the one inside a `PeftModel`, in evaluation mode.

        Raises:
            ModelInvalid: its logits are not the output layer's product with the body's last hidden state.
        """
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        name, config = str(inner.name_or_path) or type(inner).__name__, inner.config.get_text_config()
        for setting in _LOGIT_SETTINGS:
            if (value := getattr(config, setting, None)) not in (None, 1, False):
                problem = f"its config sets {setting} to {value}, so its logits are more than one matrix's product"
                raise ModelInvalid(model=name, problem=f"{problem}; use another model")
        output = inner.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            problem = f"its output layer is {type(output).__name__}, it must be a linear one"
            raise ModelInvalid(model=name, problem=problem)
        decoder = cls(body=inner.get_decoder(), weight=output.weight, bias=output.bias)
        decoder._compare(inner, name)
        return decoder

    @torch.no_grad()
    def _compare(self, inner: Any, name: str) -> None:
        ids = torch.arange(1, 5, device=self.weight.device)[None] % len(self.weight)
        own = inner(input_ids=ids, use_cache=False).logits[0].float()
        ours = self.logits(self.body(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
        difference, size = (own - ours).abs().max(), own.abs().max()
        if not difference <= 0.02 * size and torch.isfinite(size):
            problem = f"its logits are not output layer times hidden state (off by {difference:.3g}); use another model"
            raise ModelInvalid(model=name, problem=problem)

    @property
    def output_size(self) -> int:
        """V, padding included."""
        return int(self.weight.shape[0])

    def states(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """[labels, d] hidden states at the position before each label, sequence after sequence.

        Sequences are padded on the right, where a causal model never looks.
        """
        device = self.weight.device
        longest = max(len(sequence.token_ids) for sequence in sequences)
        ids = torch.zeros((len(sequences), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids.astype(np.int64))
            mask[row, : len(sequence.token_ids)] = 1
        hidden = self.body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        return torch.cat([hidden[row, s.first_label - 1 : len(s.token_ids) - 1] for row, s in enumerate(sequences)])

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] logits of some hidden states."""
        return nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)


def batches_by_length(sequences: Sequence[TokenSequence], *, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences in batches of similar length, longest first.

    A batch has at most `batch_tokens` with its padding; a longer sequence is a batch of its own.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].token_ids))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(sequences[batch[0]].token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
