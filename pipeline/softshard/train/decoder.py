"""A causal language model as its body and its output layer, so that a loss need not see all logits.

In: a model of transformers, with or without an adapter. Out: hidden states at the positions of a batch, the output
matrix that turns them into logits, and the loss of a batch. A model that does anything else to its logits, such as to
scale or cap them, is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softshard.errors import ModelInvalid
from softshard.train.batch import Batch
from softshard.train.loss import sparse_kl

__all__ = ["Decoder", "decoder_of"]

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
    """Everything before the output layer, the last norm included."""
    weight: Tensor
    """[V, d]"""
    bias: Tensor | None
    """[V]"""

    def hidden(self, batch: Batch) -> Tensor:
        """[N, d] hidden states at the batch's positions, in the order of its labels."""
        with self._mixed_precision():
            states = self.body(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        chosen: Tensor = states.flatten(0, 1)[batch.positions]
        return chosen

    def cross_entropy(self, batch: Batch, *, num_valid: int, chunk_positions: int) -> Tensor:
        """Cross-entropy to the batch's targets, in nats: the mean over labels by their weights, 0 where all are 0.

        It is the KL to the target plus the target's entropy, which no model can change, and so has the KL's gradient.
        """
        total = sparse_kl(
            self.hidden(batch),
            self.weight,
            entry_ids=batch.entry_ids,
            entry_weights=batch.entry_weights,
            entry_offsets=batch.entry_offsets,
            tail_mass=batch.tail_mass,
            position_weights=batch.position_weights,
            num_valid=num_valid,
            chunk_positions=chunk_positions,
            bias=self.bias,
            entry_in_head=batch.entry_in_head,
        )
        weight = batch.position_weights.sum()
        return total / torch.where(weight > 0, weight, 1.0)

    @contextlib.contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        """Products of a float32 adapter in the type of a half-precision base.

        Measured on two cores (135M parameters, 10 of 30 layers adapted): forward and backward take .79 s for 1,024
        tokens so, and 1.06 s where peft casts each input to float32 and each result back.
        """
        from peft.helpers import disable_input_dtype_casting

        if self.weight.dtype not in (torch.bfloat16, torch.float16):
            yield
            return
        with torch.autocast(self.weight.device.type, self.weight.dtype), disable_input_dtype_casting(self.body):
            yield


def decoder_of(model: Any) -> Decoder:
    """The decoder of a causal language model, or of the one inside a `PeftModel`.

    Raises:
        ModelInvalid: its logits are not the output layer's product with the body's last hidden state.
    """
    from peft import PeftModel

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name, config = str(inner.name_or_path) or type(inner).__name__, inner.config.get_text_config()
    for setting in _LOGIT_SETTINGS:
        if (value := getattr(config, setting, None)) not in (None, 1, False):
            problem = f"its config sets {setting} to {value}: the loss would be wrong for its logits; use another model"
            raise ModelInvalid(model=name, problem=problem)
    output = inner.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ModelInvalid(model=name, problem=f"its output layer is {type(output).__name__}, it must be a linear one")
    decoder = Decoder(body=inner.get_decoder(), weight=output.weight, bias=output.bias)
    _check(decoder, inner, name)
    return decoder


@torch.no_grad()
def _check(decoder: Decoder, inner: Any, name: str) -> None:
    ids = torch.arange(1, 5, device=decoder.weight.device)[None] % len(decoder.weight)
    own = inner(input_ids=ids, use_cache=False).logits[0].float()
    states = decoder.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = nn.functional.linear(states.to(decoder.weight.dtype), decoder.weight, decoder.bias).float()
    difference, size = (own - ours).abs().max(), own.abs().max()
    if not difference <= 0.02 * size:
        problem = f"its logits are not output layer times hidden state (off by {difference:.3g}); use another model"
        raise ModelInvalid(model=name, problem=problem)
