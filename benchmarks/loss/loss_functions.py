"""The losses that `measure.py` compares: functions of hidden states and an output matrix.

In: hidden states [N, d], a matrix [V, d], and targets. Out: functions that return the loss, ready for a backward pass.
Liger's and axolotl's are their own code, imported from the folders that LIGER and AXOLOTL name, as far as it is plain
torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss import sparse_kl

__all__ = ["CHUNK", "WAYS", "Problem", "chunked_cross_entropy", "fused_by_triton", "problem"]

CHUNK = 512
"""Positions at a time, in every way that has chunks."""
_TOP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    hidden: Tensor
    """[N, d], wants a gradient."""
    base: Tensor
    """[N, d], of a teacher that has the same output matrix."""
    weight: Tensor
    """[V, d]"""
    labels: Tensor
    """[N]"""
    top_ids: Tensor
    """[N, 64], different ones in each row."""
    top_weights: Tensor
    """[N, 64], 1 in all."""

    def sparse_kl(self, *, most: int, trained: bool = False, tail_mass: Tensor | None = None) -> Tensor:
        """The loss against the first of the top 64; with `trained`, gradients reach the output matrix too."""
        num = len(self.hidden)
        targets = SparseTargets(
            entry_ids=self.top_ids[:, :most].flatten(),
            entry_weights=self.top_weights[:, :most].flatten(),
            entry_offsets=torch.arange(num + 1) * most,
            tail_mass=tail_mass,
            position_weights=torch.ones(num),
        )
        weight = self.weight.requires_grad_() if trained else self.weight
        return sparse_kl(self.hidden, weight, targets, num_valid=len(weight), chunk_positions=CHUNK)


def problem(num_positions: int, vocab_size: int, *, width: int, kind: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(num_positions * vocab_size)
    sizes = (num_positions, width), (num_positions, width), (vocab_size, width)
    hidden, base, weight = (torch.randn(size, generator=generator, dtype=kind) for size in sizes)
    first = torch.randint(vocab_size, (num_positions, 1), generator=generator)
    # Steps of an odd number never meet again before they have gone round a vocabulary of even size.
    ids = (first + torch.arange(_TOP) * 509) % vocab_size
    return Problem(
        hidden=hidden.requires_grad_(),
        base=base,
        weight=weight.mul_(2 / width**0.5),
        labels=first[:, 0],
        top_ids=ids,
        top_weights=torch.softmax(torch.randn((num_positions, _TOP), generator=generator, dtype=kind), 1),
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The simplest that is as fast and as small as can be written in torch: gradients at once, one buffer, in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        size, kind = (min(CHUNK, len(hidden)), len(weight)), torch.promote_types(weight.dtype, torch.float32)
        buffer = torch.empty(size, dtype=kind)
        narrow = buffer if weight.dtype == kind else torch.empty(size, dtype=weight.dtype)
        gradient, loss = torch.empty_like(hidden), torch.zeros((), dtype=kind)
        for start in range(0, len(hidden), CHUNK):
            part, own = hidden[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits, product = buffer[: len(part)], narrow[: len(part)]
            torch.mm(part, weight.T, out=product)
            if narrow is not buffer:
                logits.copy_(product)
            chosen = logits.gather(1, own).sum()
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            loss += (top + total.log()).sum() - chosen
            logits.div_(total).scatter_add_(1, own, torch.full_like(total, -1.0))
            if narrow is not buffer:
                product.copy_(logits)
            torch.mm(product, weight, out=gradient[start : start + CHUNK])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0], None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")`, with a frozen matrix."""
    with torch.autocast(hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
        return apply(hidden.to(weight.dtype), weight, labels)


def _sketch(given: Problem) -> Tensor:
    return given.sparse_kl(most=13)


def _sketch_trained(given: Problem) -> Tensor:
    return given.sparse_kl(most=13, trained=True)


def _ghost(given: Problem) -> Tensor:
    return given.sparse_kl(most=_TOP, tail_mass=torch.full((len(given.hidden),), 0.1))


def _top_trained(given: Problem) -> Tensor:
    return given.sparse_kl(most=_TOP, trained=True)


def _cross_entropy(given: Problem) -> Tensor:
    return chunked_cross_entropy(given.hidden, given.weight, given.labels)


def _dense(given: Problem) -> Tensor:
    target = torch.softmax(given.base @ given.weight.T, 1)
    return functional.kl_div(torch.log_softmax(given.hidden @ given.weight.T, 1), target, reduction="sum")


def _liger(given: Problem) -> Tensor:
    """Its chunked Jensen-Shannon loss with beta 0, which is the forward KL; it always takes the matrix's gradient."""
    module: Any = _liger_module("chunked_loss")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=CHUNK
    )
    weight = given.weight.requires_grad_()
    mean: Tensor = loss(given.hidden, weight, given.base, weight.detach(), given.labels)
    return mean * len(given.hidden)


def _axolotl(given: Problem) -> Tensor:
    """Its top-k loss on Liger's chunks; it always takes the matrix's gradient."""
    loss = _axolotl_module().LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=False,
        chunk_size=CHUNK,
        compute_ce_loss=False,
        normalize_topk=False,
    )
    weight, rows = given.weight.requires_grad_(), (item[None] for item in (given.top_ids, given.top_weights.log()))
    mask = torch.ones_like(given.top_ids[None])
    total: Tensor = loss(weight, given.hidden[None], *rows, mask, given.labels[None])
    return total


WAYS: Mapping[str, Callable[[Problem], Tensor]] = {
    "sketch": _sketch,
    "topk_ghost": _ghost,
    "chunked_ce": _cross_entropy,
    "dense_kl": _dense,
    "sketch_trained": _sketch_trained,
    "topk_trained": _top_trained,
    "liger_jsd": _liger,
    "axolotl_topk": _axolotl,
}


def fused_by_triton(given: Problem) -> Tensor:
    """Liger's fused linear cross-entropy, a Triton kernel."""
    loss: Any = _liger_module("transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
    total: Tensor = loss(given.weight, given.hidden, given.labels)
    return total


def _liger_module(name: str) -> ModuleType:
    if (folder := os.environ.get("LIGER")) and folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"liger_kernel.{name}")


def _axolotl_module() -> Any:
    """The one file of axolotl that holds the loss, without what the package imports besides."""
    _liger_module("chunked_loss")
    folder = Path(os.environ["AXOLOTL"]) / "axolotl" / "integrations" / "kd"
    name = "axolotl.integrations.kd.utils"
    with mock.patch.dict(sys.modules, {name: _module_of(folder / "utils.py", name)}):
        return _module_of(folder / "kernels" / "liger.py", "axolotl.integrations.kd.kernels.liger")


def _module_of(file: Path, name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
