"""Losses on a text's own tokens, other than plain cross-entropy, with which distribution fine-tuning is compared.

In: a model, split into body and output layer, and a batch, of which only the labels are used. Out: the mean loss per
label. The logits of the whole batch exist at once, as they do in the code that these losses come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness import require
from softshard.data.batch import Batch
from softshard.finetune.hidden_states import hidden_states
from softshard.finetune.objective import Objective
from softshard.models.decoder import Decoder

__all__ = ["EntropicMatching", "LabelSmoothing", "LogitsObjective", "check_other_losses"]

_SLOPE = 0.01
"""Of the log-sigmoid in GEM's published code."""


class LogitsObjective(Objective, ABC):
    """A loss that looks at all logits, and at no stored entries."""

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """[N] losses of [N, V] logits."""

    def loss(
        self,
        decoder: Decoder,
        batch: Batch,
        *,
        num_valid: int,
        num_items_in_batch: float | Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        logits = decoder.logits(hidden_states(decoder, batch))[:, :num_valid].float()
        total = (self.losses(logits, batch) * batch.position_weights).sum()
        return total / (batch.targets.mean_divisor if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSmoothing(LogitsObjective):
    """Cross-entropy to (1 - epsilon) on the label and epsilon / V on every token (Szegedy et al., 2016)."""

    epsilon: float

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return smoothed(logits, batch.labels, self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropicMatching(LogitsObjective):
    """GEM (Li et al., 2024, arXiv 2408.16673): with q = softmax(z / beta) held fixed, and f = softmax(z),

    sum_k q_k h_k (log f_k - log f_label), h being 1 (`linear`) or sigmoid((z_k - z_label) / 100) (`logsigmoid`).
    """

    beta: float
    h: Literal["linear", "logsigmoid"]

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return entropic(logits, batch.labels, self.beta, self.h)


def smoothed(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """[N] losses."""
    logprobs = torch.log_softmax(logits, 1)
    own = logprobs.gather(1, labels[:, None])[:, 0]
    return -(1 - epsilon) * own - epsilon * logprobs.mean(1)


def entropic(logits: Tensor, labels: Tensor, beta: float, h: str) -> Tensor:
    """[N] losses."""
    fixed = logits.detach()
    weights = torch.softmax(fixed / beta, 1)
    if h == "logsigmoid":
        weights = weights * torch.sigmoid(_SLOPE * (fixed - fixed.gather(1, labels[:, None])))
    logprobs = torch.log_softmax(logits, 1)
    return (weights * (logprobs - logprobs.gather(1, labels[:, None]))).sum(1)


def check_other_losses() -> None:
    """Slopes with respect to logits against their closed forms, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(32, 200, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(200, (32,), generator=generator)
    own = torch.nn.functional.one_hot(labels, 200).double()
    plain = torch.softmax(logits.detach(), 1)
    peaked = torch.softmax(logits.detach() / 0.7, 1)
    gaps = logits.detach() - (logits.detach() * own).sum(1, keepdim=True)
    weighed = peaked / (1 + torch.exp(-_SLOPE * gaps))
    expected = {
        "label smoothing": (smoothed(logits, labels, 0.1), plain - 0.9 * own - 0.1 / 200),
        "GEM, linear": (entropic(logits, labels, 0.7, "linear"), peaked - own),
        "GEM, log-sigmoid": (
            entropic(logits, labels, 0.7, "logsigmoid"),
            weighed - weighed.sum(1, keepdim=True) * own,
        ),
    }
    for name, (losses, right) in expected.items():
        (slope,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        off = float((slope - right).norm() / right.norm())
        require(off < 1e-12, f"slope of {name} is its closed form: off by {off:.0e}")
