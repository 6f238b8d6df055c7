from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakes.targets import sparse_targets
from softshard.finetune.loss import dense_kl, sparse_kl

NUM, WIDTH, VOCAB, PADDED = 11, 6, 23, 29
DOUBLE = torch.float64


def problem(seed=0, *, dtype=DOUBLE, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM, WIDTH, generator=generator, dtype=DOUBLE) * scale
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=DOUBLE)
    bias = torch.randn(PADDED, generator=generator, dtype=DOUBLE)
    return [item.to(dtype).requires_grad_() for item in (hidden, weight, bias)]


def random_entries(seed=0, *, most=9):
    """Ragged entries, unsorted, with repeated ids, masses that are not 1, and one position that has none."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most, size=NUM)
    counts[4] = 0
    ids = rng.integers(VOCAB, size=counts.sum())
    return {
        "entry_ids": torch.from_numpy(ids),
        "entry_weights": torch.from_numpy(rng.random(counts.sum()).astype(np.float32)),
        "entry_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
    }


def dense_of(entries):
    """[N, VOCAB] float64, one entry after the other."""
    dense = np.zeros((NUM, VOCAB))
    offsets = entries["entry_offsets"].tolist()
    for position in range(NUM):
        for entry in range(offsets[position], offsets[position + 1]):
            dense[position, entries["entry_ids"][entry]] += float(entries["entry_weights"][entry])
    return torch.from_numpy(dense)


def logits_of(hidden, weight, bias):
    return hidden.double() @ weight.double()[:VOCAB].T + (0 if bias is None else bias.double()[:VOCAB])


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def assert_same(actual, expected, *, rtol=1e-9):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("chunk", [1, 4, NUM, 100])
def test_loss_and_all_gradients_are_those_of_the_dense_computation(chunk):
    hidden, weight, bias = problem()
    entries, weights = random_entries(), torch.rand(NUM, dtype=torch.float32)
    loss = sparse_kl(
        hidden,
        weight,
        sparse_targets(**entries, position_weights=weights),
        bias=bias,
        num_valid=VOCAB,
        chunk_positions=chunk,
    )
    crossed = -(dense_of(entries) * torch.log_softmax(logits_of(hidden, weight, bias), dim=1)).sum(dim=1)
    expected = (weights.double() * crossed).sum()
    assert_same([loss], [expected])
    assert_same(gradients(3 * loss, hidden, weight, bias), gradients(3 * expected, hidden, weight, bias))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_kl_gradient_is_that_of_the_dense_kl_for_every_alpha(alpha):
    hidden, weight, _ = problem(1)
    target = torch.softmax(torch.randn(NUM, VOCAB, dtype=DOUBLE, generator=torch.Generator().manual_seed(7)), dim=1)
    labels = torch.arange(NUM) * 2 % VOCAB
    ids = torch.cat([labels[:, None], torch.arange(VOCAB).expand(NUM, VOCAB)], dim=1)
    weights = torch.cat([torch.full((NUM, 1), alpha, dtype=DOUBLE), (1 - alpha) * target], dim=1)
    loss = sparse_kl(
        hidden,
        weight,
        sparse_targets(
            entry_ids=ids.flatten(),
            entry_weights=weights.flatten(),
            entry_offsets=torch.arange(NUM + 1) * (VOCAB + 1),
        ),
        num_valid=VOCAB,
        chunk_positions=5,
    )
    mixed = (1 - alpha) * target
    mixed[torch.arange(NUM), labels] += alpha
    kl = torch.nn.functional.kl_div(torch.log_softmax(logits_of(hidden, weight, None), dim=1), mixed, reduction="sum")
    entropy = -torch.special.xlogy(mixed, mixed).sum()
    assert_same([loss], [kl + entropy])
    assert_same(gradients(loss, hidden, weight), gradients(kl, hidden, weight))


def ghost_reference(hidden, weight, entries, in_head, tail, weights):
    """-sum P ln q - tail ln(1 - sum_head q), the last from the log-sum-exp of the tokens outside."""
    logits = logits_of(hidden, weight, None)
    logs = torch.log_softmax(logits, dim=1)
    outside = torch.ones(NUM, VOCAB, dtype=torch.bool)
    offsets = entries["entry_offsets"].tolist()
    for position in range(NUM):
        for entry in range(offsets[position], offsets[position + 1]):
            if in_head is None or in_head[entry]:
                outside[position, entries["entry_ids"][entry]] = False
    ghost = torch.logsumexp(logits.masked_fill(~outside, -torch.inf), dim=1) - torch.logsumexp(logits, dim=1)
    return (weights.double() * (-(dense_of(entries) * logs).sum(dim=1) - tail.double() * ghost)).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [3, NUM])
def test_ghost_token_has_the_mass_outside_the_head(chunk, masked):
    hidden, weight, _ = problem(2)
    entries, tail, weights = random_entries(3), torch.rand(NUM), torch.rand(NUM)
    in_head = torch.rand(len(entries["entry_ids"])) < 0.6 if masked else None
    loss = sparse_kl(
        hidden,
        weight,
        sparse_targets(**entries, tail_mass=tail, entry_in_head=in_head, position_weights=weights),
        num_valid=VOCAB,
        chunk_positions=chunk,
    )
    expected = ghost_reference(hidden, weight, entries, in_head, tail, weights)
    assert_same([loss], [expected])
    assert_same(gradients(loss, hidden, weight), gradients(expected, hidden, weight))


def test_ghost_stays_finite_and_right_when_the_head_takes_nearly_all_the_mass():
    hidden, weight, _ = problem(4, scale=60.0)
    entries = {
        "entry_ids": (hidden @ weight[:VOCAB].T).argmax(dim=1),
        "entry_weights": torch.full((NUM,), 0.9),
        "entry_offsets": torch.arange(NUM + 1),
    }
    tail = torch.full((NUM,), 0.1)
    expected = ghost_reference(hidden, weight, entries, None, tail, torch.ones(NUM))
    single = [item.detach().float().requires_grad_() for item in (hidden, weight)]
    loss = sparse_kl(*single, sparse_targets(**entries, tail_mass=tail), num_valid=VOCAB, chunk_positions=4)
    q = torch.softmax(single[0] @ single[1][:VOCAB].T, dim=1).amax(dim=1)
    assert (q == 1).any(), "the case that is to be tested"
    assert_same([loss], [expected], rtol=1e-5)
    assert_same(gradients(loss, *single), gradients(expected, hidden, weight), rtol=1e-4)


def test_a_head_of_the_whole_vocabulary_leaves_no_ghost():
    hidden, weight, _ = problem(5)
    entries = {
        "entry_ids": torch.arange(VOCAB).repeat(NUM),
        "entry_weights": torch.full((NUM * VOCAB,), 1 / VOCAB),
        "entry_offsets": torch.arange(NUM + 1) * VOCAB,
    }
    sizes = {"num_valid": VOCAB, "chunk_positions": 4}
    with_ghost = sparse_kl(hidden, weight, sparse_targets(**entries, tail_mass=torch.full((NUM,), 0.25)), **sizes)
    without = sparse_kl(hidden, weight, sparse_targets(**entries), **sizes)
    assert_same([with_ghost], [without])
    assert_same(gradients(with_ghost, hidden, weight), gradients(without, hidden, weight))


def test_padding_vocabulary_takes_no_probability_and_gets_no_gradient():
    hidden, weight, _ = problem(6)
    targets = sparse_targets(**random_entries())
    loss = sparse_kl(hidden, weight, targets, num_valid=VOCAB, chunk_positions=4)
    cut = weight.detach()[:VOCAB].clone().requires_grad_()
    expected = sparse_kl(hidden, cut, targets, num_valid=VOCAB, chunk_positions=4)
    assert loss == expected
    gradient, gradient_cut = gradients(loss, weight)[0], gradients(expected, cut)[0]
    assert torch.equal(gradient[:VOCAB], gradient_cut)
    assert not gradient[VOCAB:].any()
    assert sparse_kl(hidden, weight, targets, num_valid=PADDED, chunk_positions=4) > loss


def test_positions_of_weight_zero_have_no_part_in_it():
    hidden, weight, _ = problem(7)
    weights = torch.ones(NUM)
    weights[[2, 5]] = 0
    loss = sparse_kl(
        hidden,
        weight,
        sparse_targets(**random_entries(), position_weights=weights),
        num_valid=VOCAB,
        chunk_positions=4,
    )
    gradient = gradients(loss, hidden)[0]
    assert not gradient[[2, 5]].any()
    assert gradient[[0, 1, 3, 6]].abs().sum(dim=1).all()


@pytest.mark.parametrize("ghost", [False, True])
def test_gradcheck(ghost):
    inputs = problem(8)
    tail = torch.rand(NUM) if ghost else None

    def loss(hidden, weight, bias):
        return sparse_kl(
            hidden,
            weight,
            sparse_targets(**random_entries(9), tail_mass=tail, position_weights=torch.linspace(0, 1, NUM)),
            bias=bias,
            num_valid=VOCAB,
            chunk_positions=4,
        )

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_is_near_the_float64_result(dtype, rtol):
    hidden, weight, _ = problem(10, dtype=dtype)
    targets, sizes = sparse_targets(**random_entries()), {"num_valid": VOCAB, "chunk_positions": 4}
    loss = sparse_kl(hidden, weight, targets, **sizes)
    double = [item.detach().double().requires_grad_() for item in (hidden, weight)]
    expected = sparse_kl(*double, targets, **sizes)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=rtol)
    for actual, exact in zip(gradients(loss, hidden, weight), gradients(expected, *double), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).norm() <= rtol * exact.norm()


def test_mean_over_many_positions_keeps_its_scale_in_bfloat16():
    hidden, weight, _ = problem(10, dtype=torch.bfloat16)
    targets, sizes = sparse_targets(**random_entries()), {"num_valid": VOCAB, "chunk_positions": 4}
    whole = gradients(sparse_kl(hidden, weight, targets, **sizes), hidden)[0]
    mean = gradients(sparse_kl(hidden, weight, targets, **sizes) / 1003, hidden)[0]
    ratio = (mean.double().sum() / whole.double().sum() * 1003).item()
    assert ratio == pytest.approx(1, abs=1e-3)  # 1/1003 itself is .3% off in bfloat16


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, list | tuple) else [result]:
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return result


def measured(loss):
    saved = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda item: saved.append(item.numel()) or item, lambda item: item),
    ):
        loss().backward()
    return largest.numel, max(saved)


@pytest.mark.parametrize("ghost", [False, True])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk_and_none_of_them_is_kept(ghost):
    num, width, vocab, chunk = 256, 4, 300, 16
    hidden = torch.randn(num, width, requires_grad=True)
    base = torch.randn(num, width)
    weight = torch.randn(vocab, width)
    entries = {
        "entry_ids": torch.arange(num),
        "entry_weights": torch.ones(num),
        "entry_offsets": torch.arange(num + 1),
    }
    sizes = {"num_valid": vocab, "chunk_positions": chunk}
    tail = torch.full((num,), 0.1) if ghost else None
    targets = sparse_targets(**entries, tail_mass=tail)
    sparse = measured(lambda: sparse_kl(hidden, weight, targets, **sizes))
    dense = measured(lambda: dense_kl(hidden, base, weight, **sizes))
    plain = measured(lambda: torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(num)))
    assert sparse[0] <= chunk * vocab
    assert dense[0] <= 3 * chunk * vocab
    assert sparse[1] == dense[1] == num * width
    assert min(plain) >= num * vocab, "the measurement sees the logits where they are all there"


def test_without_gradients_only_the_value_is_computed():
    hidden, weight, _ = problem()
    with torch.no_grad():
        loss = sparse_kl(hidden, weight, sparse_targets(**random_entries()), num_valid=VOCAB, chunk_positions=4)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry_ids": torch.full((3,), VOCAB)}, "not in the vocabulary"),
        ({"entry_offsets": torch.tensor([0, 3])}, "offsets"),
        ({"num_valid": PADDED + 1}, "num_valid"),
        ({"chunk_positions": 0}, "chunk_positions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    hidden, weight, _ = problem()
    arguments = {
        "entry_ids": torch.zeros(3, dtype=torch.int64),
        "entry_weights": torch.ones(3),
        "entry_offsets": torch.tensor([0] * NUM + [3]),
        "num_valid": VOCAB,
        "chunk_positions": 4,
        **change,
    }
    sizes = {name: arguments.pop(name) for name in ("num_valid", "chunk_positions")}
    with pytest.raises(ValueError, match=message):
        sparse_kl(hidden, weight, sparse_targets(**arguments), **sizes)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_dense_kl_and_its_gradient_are_those_of_the_dense_computation(chunk):
    hidden, weight, bias = problem(11)
    base = problem(12)[0]
    weight, bias, weights = weight.detach(), bias.detach(), torch.rand(NUM)
    loss = dense_kl(hidden, base, weight, bias=bias, position_weights=weights, num_valid=VOCAB, chunk_positions=chunk)
    logs = torch.log_softmax(logits_of(hidden, weight, bias), dim=1)
    base_logs = torch.log_softmax(logits_of(base.detach(), weight, bias), dim=1)
    expected = (weights.double() * (base_logs.exp() * (base_logs - logs)).sum(dim=1)).sum()
    assert_same([loss], [expected])
    assert_same(gradients(loss, hidden), gradients(expected, hidden))


def test_dense_kl_of_a_model_with_itself_is_zero_with_no_gradient():
    hidden, weight, _ = problem(13, dtype=torch.float32)
    loss = dense_kl(hidden, hidden, weight.detach(), num_valid=VOCAB, chunk_positions=4)
    assert loss == 0
    assert not gradients(loss, hidden)[0].any()


def test_dense_kl_gradcheck():
    hidden, weight, _ = problem(14)
    base = problem(15)[0].detach()
    assert torch.autograd.gradcheck(
        lambda item: dense_kl(item, base, weight.detach(), num_valid=VOCAB, chunk_positions=4), [hidden]
    )


def test_dense_kl_refuses_an_output_layer_that_is_trained():
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match="trained"):
        dense_kl(hidden, hidden, weight, num_valid=VOCAB, chunk_positions=4)
