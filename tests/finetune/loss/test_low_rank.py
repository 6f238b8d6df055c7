"""An adapter of the output layer in the fused losses: z = W h + B u is the product of [W B] with (h, u)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakes.losses import (
    DIVERGENCES,
    DOUBLE,
    NUM,
    PADDED,
    TRANSFORMS,
    heads,
    inputs,
    loss_of,
    off,
    reference,
)
from fakes.targets import sparse_targets
from softshard.finetune.loss import dense_kl, sparse_kl
from softshard.models.decoder import LowRank

RANK = 2
OPTIONS = list(itertools.product(TRANSFORMS, [1.0, 2.0], [False, True], [0.0, 0.4]))


def halves(seed, *, dtype):
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = (NUM, RANK), (PADDED, RANK)
    return [torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-6), (torch.float32, 1e-5)])
def test_loss_and_all_gradients_agree_with_the_dense_float64_computation(divergence, dtype, bound):
    worst = 0.0
    for number, (transform, temperature, masked, alpha) in enumerate(OPTIONS):
        weights = torch.rand(NUM, generator=torch.Generator().manual_seed(number))
        weights[[0, 3, 8]] *= 0 if masked else 1
        options = {"position_weights": weights, "transform": TRANSFORMS[transform], "temperature": temperature}
        target = heads(number, alpha=alpha)
        hidden, weight, bias = inputs(number, dtype=dtype)
        features, factor = halves(number, dtype=dtype)
        tensors = [hidden, weight, bias, features, factor]
        loss = loss_of(divergence, hidden, weight, target, bias=bias, low_rank=LowRank(features, factor), **options)
        doubles = [item.detach().double().requires_grad_() for item in tensors]
        wide, matrix = torch.cat([doubles[0], doubles[3]], 1), torch.cat([doubles[1], doubles[4]], 1)
        exact = reference(divergence, wide, matrix, target, bias=doubles[2], **options)
        gradients = torch.autograd.grad(loss, tensors), torch.autograd.grad(exact, doubles)
        worst = max(worst, off([loss], [exact]), off(*gradients))
    assert 0 < worst <= bound


def test_kl_to_a_base_without_the_adapter_and_its_gradients():
    hidden, weight, bias = (item.detach() for item in inputs(3))
    base, leaves = hidden.roll(1, 0), [hidden.requires_grad_(), *halves(3, dtype=DOUBLE)]
    options = {"num_valid": 17, "chunk_positions": 4, "bias": bias}
    ours = dense_kl(hidden, base, weight, low_rank=LowRank(*leaves[1:]), **options)
    own = (hidden @ weight.T + leaves[1] @ leaves[2].T + bias)[:, :17].log_softmax(1)
    frozen = (base @ weight.T + bias)[:, :17].log_softmax(1)
    exact = (frozen.exp() * (frozen - own)).sum()
    assert off([ours], [exact]) < 1e-6
    assert off(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves)) < 1e-6


@pytest.mark.parametrize("shape", [((NUM, 3), (PADDED, 2)), ((NUM + 1, 2), (PADDED, 2)), ((NUM, 2), (PADDED - 1, 2))])
def test_halves_that_do_not_fit_are_refused(shape):
    hidden, weight, _ = inputs()
    with pytest.raises(ValueError, match="features are"):
        loss_of("forward", hidden, weight, heads(), low_rank=LowRank(torch.ones(shape[0]), torch.ones(shape[1])))


class LargestShare(TorchDispatchMode):
    """Most elements of any tensor that an operation gives back, the output matrix itself left out."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix, self.elements = matrix.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() != self.matrix:
                self.elements = max(self.elements, item.numel())
        return out


def test_neither_all_logits_nor_a_second_matrix_is_ever_made():
    num, width, vocab, chunk = 64, 48, 1000, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((num, width), generator=generator, requires_grad=True)
    weight = torch.randn((vocab, width), generator=generator)
    low = LowRank(torch.randn((num, 4), requires_grad=True), torch.zeros((vocab, 4), requires_grad=True))
    with LargestShare(weight) as seen:
        loss = sparse_kl(
            hidden,
            weight,
            sparse_targets(
                entry_ids=torch.arange(num), entry_weights=torch.ones(num), entry_offsets=torch.arange(num + 1)
            ),
            num_valid=vocab,
            chunk_positions=chunk,
            low_rank=low,
        )
        torch.autograd.backward(loss)
    assert low.factor.grad.abs().max() > 0
    assert seen.elements == chunk * vocab < min(num * vocab, width * vocab)
