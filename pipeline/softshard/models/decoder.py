"""A causal language model split into its body and its output layer, so that all logits never exist at once.

In: a model of transformers, with adapters or without, and sequences. Out: hidden states at the position before each
label, and the logits of any of them. Models that scale or cap their logits as their config says are supported; a model
that does anything else to them is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softshard.errors import ModelInvalid
from softshard.models.output_layer import LowRank, lora_term, model_name, output_parts, perturbed, without_wrapper
from softshard.sketch.types import TokenSequence

__all__ = ["PLAIN_LOGITS", "Decoder", "LogitTransform", "LowRank", "batches_by_length", "evaluating"]

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_EITHER = "logits_scaling"
"""Granite divides by it, HyperCLOVA X multiplies by it; comparison with the model's own logits decides."""
_PROBE_SIZE = 100.0
"""Products of this size show caps up to 400, which change them by 2%; smaller products would not."""
_TOLERANCE = 0.02
"""Share of the largest logit: bfloat16 rounds by .4% in each of a few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """Turns the output layer's product x into a logit: `scale * x`, or `cap * tanh(scale * x / cap)` with a soft cap.

    The cap is Gemma 2's (arXiv 2408.00118, section 2), the scale Granite's and Cohere's.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits, in the product's type; the product itself where there is no scale and no cap."""
        if self.soft_cap is not None:
            return self.soft_cap * torch.tanh(product * (self.scale / self.soft_cap))
        return product if self.scale == 1 else product * self.scale


PLAIN_LOGITS = LogitTransform()
"""Logits are the product itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Logits of a position are `transform(weight @ hidden + bias)`, plus the term of an adapter of the output layer."""

    body: nn.Module
    """Everything before the output layer, including the last norm; adapters on its layers stay active."""
    weight: Tensor
    """[V, d]"""
    bias: Tensor | None
    """[V]"""
    transform: LogitTransform = PLAIN_LOGITS
    output: nn.Module | None = None
    """The output layer with its adapter; None without one. `weight` and `bias` are those of the wrapped layer."""

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """The decoder of a causal language model in evaluation mode, or of the model inside a `PeftModel`.

        Raises:
            ModelInvalid: its logits are not the output layer's product with the body's last hidden state, scaled and
                capped as its config says.
        """
        inner = without_wrapper(model)
        name = model_name(inner)
        layer = inner.get_output_embeddings()
        transforms, named = _possible_transforms(inner.config.get_text_config())

        def candidate(transform: LogitTransform) -> Decoder:
            weight, bias, adapter = output_parts(layer, model=name)
            return cls(body=inner.get_decoder(), weight=weight, bias=bias, transform=transform, output=adapter)

        plain = candidate(PLAIN_LOGITS)
        with torch.no_grad(), perturbed(layer, but=(plain.weight, plain.bias, inner.get_input_embeddings().weight)):
            differences = [candidate(transform)._difference(inner) for transform in transforms]
        difference = min(differences)
        if not difference <= _TOLERANCE:
            what = "its logits are not output layer times hidden state" + (f" with {named}" if named else "")
            raise ModelInvalid(model=name, problem=f"{what} (off by {difference:.2g}); use another model")
        return candidate(transforms[differences.index(difference)])

    @torch.no_grad()
    def _difference(self, inner: Any) -> float:
        """Largest difference from the model's own logits as a share of the largest logit, for enlarged hidden states.

        0 where weights that are not finite leave nothing to compare: scoring finds those and names the position.
        """
        seen: list[Tensor] = []

        def enlarge(module: nn.Module, inputs: Any, output: Any) -> Any:
            product = nn.functional.linear(output.last_hidden_state.to(self.weight.dtype), self.weight, self.bias)
            factor = _PROBE_SIZE / max(float(product.abs().max()), 1e-30)
            output.last_hidden_state = output.last_hidden_state * factor
            seen.append(output.last_hidden_state)
            return output

        ids = torch.arange(1, 5, device=self.weight.device)[None] % len(self.weight)
        hook = self.body.register_forward_hook(enlarge)
        try:
            own = inner(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            hook.remove()
        difference = (own - self.logits(seen[-1][0]).float()).abs().max() / own.abs().max()
        return float(difference) if bool(torch.isfinite(own).all()) else 0.0

    @property
    def output_size(self) -> int:
        """V, including padding."""
        return int(self.weight.shape[0])

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """[N, d] hidden states at the position before each of the N labels, sequence after sequence.

        Sequences are padded on the right, which a causal model never attends to.
        """
        device = self.weight.device
        longest = max(len(sequence.token_ids) for sequence in sequences)
        ids = torch.zeros((len(sequences), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids.astype(np.int64))
            mask[row, : len(sequence.token_ids)] = 1
        hidden = self.body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        spans = [(row, start, stop) for row, sequence in enumerate(sequences) for start, stop in sequence.label_spans]
        return torch.cat([hidden[row, start - 1 : stop - 1] for row, start, stop in spans])

    def adapted(self, states: Tensor) -> tuple[Tensor, LowRank | None]:
        """The input of the output matrix and the term to add to its product, with the adapter of the output layer.

        Without an adapter, or where it is disabled: the states themselves and None. Differentiable in states and
        adapter; the adapter's products are computed in its own type.
        """
        if self.output is None:
            return states, None
        output: Any = self.output
        if hasattr(output, "adapted"):
            found: tuple[Tensor, LowRank | None] = output.adapted(states)
            return found
        return states, lora_term(output, states)

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] logits of hidden states [..., d]."""
        states, low_rank = self.adapted(states)
        product = nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)
        if low_rank is not None:
            product = product + nn.functional.linear(*low_rank).to(product.dtype)
        return self.transform(product)


def _possible_transforms(config: Any) -> tuple[list[LogitTransform], str]:
    """The transforms that a config can mean, and the settings that name them, for an error."""
    found = {
        name: float(value)
        for name in (*_CAPS, *_FACTORS, _EITHER)
        if (value := getattr(config, name, None)) not in (None, 1, False)
    }
    cap = next((found[name] for name in _CAPS if name in found), None)
    factor = float(np.prod([found[name] for name in _FACTORS if name in found]))
    scales = [factor / found[_EITHER], factor * found[_EITHER]] if _EITHER in found else [factor]
    named = " and ".join(f"{name} {value:g}" for name, value in found.items())
    return [LogitTransform(scale=scale, soft_cap=cap) for scale in scales], named


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside the block; afterwards each of its modules has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches_by_length(sequences: Sequence[TokenSequence], *, batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices of sequences of similar length, longest first.

    A batch has at most `batch_tokens` tokens, including padding; a longer sequence is a batch of its own.
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
