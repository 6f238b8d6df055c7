from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakes.losses import (
    DIVERGENCES,
    DOUBLE,
    NUM,
    TRANSFORMS,
    VOCAB,
    heads,
    inputs,
    loss_of,
    off,
    reference,
)
from fakes.targets import sparse_targets
from softshard.config.train import LINEAR_DIVERGENCES, Divergence
from softshard.finetune.loss import dense_kl, divergences, sparse_divergence, sparse_kl


def compare(divergence, target, *, seed, dtype, with_bias, **options):
    """Relative errors of the loss and of all gradients."""
    hidden, weight, bias = inputs(seed, dtype=dtype)
    tensors = [hidden, weight, *([bias] if with_bias else [])]
    given = {**options, "bias": bias if with_bias else None}
    loss = loss_of(divergence, hidden, weight, target, **given)
    doubles = [item.detach().double().requires_grad_() for item in tensors]
    exact = reference(
        divergence, doubles[0], doubles[1], target, **{**given, "bias": doubles[2] if with_bias else None}
    )
    return (
        off([loss], [exact]),
        off(torch.autograd.grad(loss, tensors), torch.autograd.grad(exact, doubles)),
    )


OPTIONS = list(itertools.product(TRANSFORMS, [1.0, 2.0], [False, True], [0.0, 0.4], [False, True]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "bound"), [(DOUBLE, 1e-6), (torch.float32, 1e-5)])
def test_every_combination_of_options_agrees_with_the_dense_float64_computation(divergence, dtype, bound):
    worst = 0.0
    for number, (transform, temperature, masked, alpha, ghost) in enumerate(OPTIONS):
        weights = torch.rand(NUM, generator=torch.Generator().manual_seed(number))
        weights[[0, 3, 8]] *= 0 if masked else 1
        errors = compare(
            divergence,
            heads(number, alpha=alpha, ghost=ghost),
            seed=number,
            dtype=dtype,
            with_bias=number % 2 == 0,
            position_weights=weights,
            transform=TRANSFORMS[transform],
            temperature=temperature,
        )
        worst = max(worst, *errors)
    assert len(OPTIONS) == 64
    assert 0 < worst <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_bfloat16_is_near_float64_and_its_sums_are_float32(divergence, transform):
    loss, gradients = compare(
        divergence,
        heads(1, alpha=0.2),
        seed=1,
        dtype=torch.bfloat16,
        with_bias=True,
        transform=TRANSFORMS[transform],
        temperature=2.0,
    )
    assert max(loss, gradients) < 3e-2
    hidden, weight, _ = inputs(1, dtype=torch.bfloat16)
    assert loss_of(divergence, hidden, weight, heads(1)).dtype == torch.float32


def test_small_shares_of_many_chunks_add_up_in_float32_where_bfloat16_would_lose_them():
    num = 600
    hidden = torch.ones(num, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = sparse_kl(
        hidden,
        weight,
        sparse_targets(
            entry_ids=torch.zeros(num, dtype=torch.int64),
            entry_weights=torch.ones(num),
            entry_offsets=torch.arange(num + 1),
        ),
        num_valid=2,
        chunk_positions=1,
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient[:, 0].tolist() == [-300.0, 300.0]  # in bfloat16 the sum of halves stands still at 128


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", ["plain", "both"])
@pytest.mark.parametrize("ghost", [False, True])
def test_gradcheck(divergence, transform, ghost):
    target = heads(3, alpha=0.3, ghost=ghost)
    weights = torch.linspace(0, 1, NUM, dtype=DOUBLE)

    def loss(hidden, weight, bias):
        options = {"bias": bias, "position_weights": weights, "transform": TRANSFORMS[transform], "temperature": 1.5}
        return loss_of(divergence, hidden, weight, target, **options)

    assert torch.autograd.gradcheck(loss, inputs(3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_matrix_of_tied_embeddings_gets_the_gradient_of_both_its_uses(divergence):
    _, embedding, _ = inputs(4)
    ids, target = torch.arange(NUM) % VOCAB, heads(4)
    (ours,) = torch.autograd.grad(
        loss_of(divergence, torch.tanh(embedding[ids]), embedding, target, chunk_positions=2), embedding
    )
    (expected,) = torch.autograd.grad(
        reference(divergence, torch.tanh(embedding[ids]), embedding, target), embedding, retain_graph=True
    )
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_of_the_models_vocabulary_has_no_part_in_it(divergence):
    hidden, weight, bias = inputs(5)
    loss = loss_of(divergence, hidden, weight, heads(5), bias=bias)
    of_weight, of_bias = torch.autograd.grad(loss, [weight, bias])
    assert not of_weight[VOCAB:].any()
    assert not of_bias[VOCAB:].any()
    assert of_weight[:VOCAB].abs().sum(dim=1).all()


class RowsOfProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_positions_are_not_projected_nor_looked_at(divergence):
    hidden, weight, _ = inputs(6)
    weights = torch.tensor([1.0, 0, 0, 2, 0, 1, 0, 0, 1])
    with torch.no_grad():
        hidden[weights == 0] = torch.nan
    with RowsOfProducts() as products:
        loss = loss_of(divergence, hidden, weight.detach(), heads(6), position_weights=weights, chunk_positions=3)
    assert products.rows == [3, 3, 1, 1]  # logits, then the gradient of the hidden states, of the four that count
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert not gradient[weights == 0].any()
    assert gradient[weights > 0].abs().sum(dim=1).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_all_positions_masked_and_none_at_all_give_zero_and_gradients_of_zero(divergence, alpha):
    for num, weights in ((NUM, torch.zeros(NUM)), (0, None), (0, torch.zeros(0))):
        hidden, weight, bias = inputs(7)
        hidden = hidden.detach()[:num].requires_grad_()
        target = heads(7, num=num, alpha=alpha)
        loss = loss_of(divergence, hidden, weight, target, bias=bias, position_weights=weights)
        assert loss.item() == 0
        for tensor, gradient in zip(
            (hidden, weight, bias), torch.autograd.grad(loss, [hidden, weight, bias]), strict=True
        ):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_label_alone(divergence):
    hidden, weight, _ = inputs(8)
    target = heads(8, num=1, alpha=0.5)
    one = hidden.detach()[:1].requires_grad_()
    loss, exact = (make(divergence, one, weight, target) for make in (loss_of, reference))
    assert off([loss], [exact]) < 1e-9
    assert off(torch.autograd.grad(loss, [one, weight]), torch.autograd.grad(exact, [one, weight])) < 1e-9


def own_distribution(hidden, weight, *, ghost):
    """A target that is the model's own, of its head's cells or whole."""
    q = torch.softmax((hidden @ weight.T)[:, :VOCAB].detach().double(), dim=1)
    target = heads(9, ghost=ghost)
    rows = torch.repeat_interleave(target["entry_offsets"].diff())
    target["entry_weights"] = q[rows, target["entry_ids"]]
    if ghost:
        target["tail_mass"] = 1 - torch.zeros(NUM, dtype=DOUBLE).index_add_(0, rows, target["entry_weights"])
    return target


@pytest.mark.parametrize("divergence", ["reverse", "jensen_shannon"])
@pytest.mark.parametrize("ghost", [False, True])
def test_a_model_that_has_the_targets_cells_loses_nothing_and_has_no_gradient(divergence, ghost):
    hidden, weight, _ = inputs(9)
    loss = loss_of(divergence, hidden, weight, own_distribution(hidden, weight, ghost=ghost))
    assert abs(loss.item()) < 1e-12
    assert max(item.abs().max() for item in torch.autograd.grad(loss, [hidden, weight])) < 1e-12


@pytest.mark.parametrize("divergence", ["reverse", "jensen_shannon"])
def test_a_coarse_divergence_is_below_the_one_of_the_whole_distributions(divergence):
    hidden, weight, _ = inputs(10)
    whole, coarse = (loss_of(divergence, hidden, weight, heads(10, ghost=ghost)).item() for ghost in (False, True))
    assert 0 < coarse < whole


def test_jensen_shannon_weighs_the_two_sides_by_beta():
    """Whichever is called P: JSD_beta(P || Q) = JSD_(1 - beta)(Q || P)."""
    eye = torch.eye(VOCAB, dtype=DOUBLE)
    p, q = (
        torch.softmax(torch.randn(VOCAB, dtype=DOUBLE, generator=torch.Generator().manual_seed(n)), 0) for n in (1, 2)
    )

    def divergence(target, model, beta):
        return sparse_divergence(
            model.log()[None],
            eye,
            sparse_targets(entry_ids=torch.arange(VOCAB), entry_weights=target, entry_offsets=torch.tensor([0, VOCAB])),
            divergence="jensen_shannon",
            jsd_beta=beta,
            num_valid=VOCAB,
            chunk_positions=1,
        ).item()

    assert divergence(p, q, 0.2) == pytest.approx(divergence(q, p, 0.8), rel=1e-9)
    assert divergence(p, q, 0.2) != pytest.approx(divergence(p, q, 0.8), rel=1e-2)


def test_reverse_kl_is_exact_where_the_head_takes_nearly_all_the_models_mass():
    hidden, weight, _ = inputs(11)
    single, matrix = (hidden * 8).detach().float().requires_grad_(), weight.detach().float()
    q = torch.softmax((single @ matrix.T)[:, :VOCAB], dim=1)
    target = heads(11)
    target["entry_ids"][target["entry_offsets"][:-1]] = q.argmax(dim=1)
    assert (q.amax(dim=1) == 1).any(), "the case that is to be tested"
    loss = loss_of("reverse", single, matrix, target)
    exact = single.detach().double().requires_grad_()
    expected = reference("reverse", exact, matrix, target)
    assert off([loss], [expected]) < 1e-5
    assert off(torch.autograd.grad(loss, [single]), torch.autograd.grad(expected, [exact])) < 1e-4


def test_a_temperature_gives_hintons_loss():
    """T^2 KL(p_T || q_T); as T grows its gradient in the logits nears (z - v) / V, both of mean 0."""
    eye = torch.eye(VOCAB, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(12)
    z, v = (torch.randn(1, VOCAB, dtype=DOUBLE, generator=generator) for _ in range(2))
    z, v, high = (z - z.mean()).requires_grad_(), v - v.mean(), 1e4
    loss = sparse_kl(
        z,
        eye,
        sparse_targets(
            entry_ids=torch.arange(VOCAB),
            entry_weights=torch.softmax(v[0] / high, dim=0),
            entry_offsets=torch.tensor([0, VOCAB]),
        ),
        num_valid=VOCAB,
        chunk_positions=1,
        temperature=high,
    )
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], (z - v).detach() / VOCAB, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dense_kl_takes_what_the_model_does_to_its_logits_and_leaves_out_masked_positions(transform):
    hidden, weight, bias = inputs(13)
    base, weight, bias = inputs(14)[0].detach(), weight.detach(), bias.detach()
    weights = torch.rand(NUM, generator=torch.Generator().manual_seed(13))
    weights[[1, 4]] = 0
    done = TRANSFORMS[transform]
    loss = dense_kl(
        hidden,
        base,
        weight,
        bias=bias,
        position_weights=weights,
        num_valid=VOCAB,
        chunk_positions=2,
        transform=done,
    )

    def logs(states):
        z = (states @ weight.T + bias)[:, :VOCAB] * done.scale
        return torch.log_softmax(z if done.soft_cap is None else done.soft_cap * torch.tanh(z / done.soft_cap), dim=1)

    expected = (weights.double() * (logs(base).exp() * (logs(base) - logs(hidden))).sum(dim=1)).sum()
    assert off([loss], [expected]) < 1e-6
    assert off(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"jsd_beta": 0.0}, "jsd_beta"), ({"jsd_beta": 1.0}, "jsd_beta"), ({"temperature": 0.0}, "temperature")],
)
def test_settings_out_of_their_bounds_are_refused(options, message):
    hidden, weight, _ = inputs()
    given = {"divergence": "jensen_shannon", "jsd_beta": 0.5, **options}
    sizes = {"num_valid": VOCAB, "chunk_positions": 4}
    with pytest.raises(ValueError, match=message):
        sparse_divergence(hidden, weight, sparse_targets(**heads()), **sizes, **given)


def test_a_ghost_without_mass_makes_the_reverse_kl_infinite_and_not_wrong():
    hidden, weight, _ = inputs(15)
    target = {**heads(15), "tail_mass": torch.zeros(NUM, dtype=DOUBLE)}
    assert loss_of("reverse", hidden, weight, target).item() == math.inf
    assert math.isfinite(loss_of("jensen_shannon", hidden, weight, target).item())


def test_every_divergence_of_the_job_file_has_one_implementation():
    assert sorted(divergences.DIVERGENCES) == sorted(get_args(Divergence)) == sorted(DIVERGENCES)
    assert set(DIVERGENCES) > LINEAR_DIVERGENCES
