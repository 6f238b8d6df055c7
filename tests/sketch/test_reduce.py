"""Sketches against a dense float64 computation of the same rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from softshard.config import FullSketch, NucleusSketch, ThresholdSketch, TopkSketch
from softshard.errors import LogitsInvalid
from softshard.sketch.codec import to_mass_grid
from softshard.sketch.join import concatenate, split_rows
from softshard.sketch.philox import label_uniforms
from softshard.sketch.reduce import sketch_rows, stored_entries

TAU = 1 / 24


def sketch(logits, settings=None, *, uniforms=None, labels=None, vocab_size=None, temperature=1.0):
    rows = len(logits)
    return sketch_rows(
        logits,
        labels=torch.zeros(rows, dtype=torch.long) if labels is None else labels,
        uniforms=np.atleast_2d(np.full(rows, 0.5) if uniforms is None else np.asarray(uniforms, dtype=np.float64)),
        settings=settings or ThresholdSketch(),
        vocab_size=vocab_size or logits.shape[1],
        places=[("seq", row) for row in range(rows)],
        temperature=temperature,
    )


def dense(logits):
    values = logits.double().numpy()
    exp = np.exp(values - values.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def random_logits(rows, vocab, *, seed=0, scale=2.5):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def rows_of(ids, counts):
    return np.split(ids, np.cumsum(counts)[:-1])


def test_expectation_of_the_sketch_is_the_target_token_by_token():
    vocab, draws, distributions = 500, 12_000, 3
    logits = random_logits(distributions, vocab, scale=1.8)
    target = dense(logits)
    settings = ThresholdSketch(tau=TAU, step=0.002)
    total = np.zeros((distributions, vocab))
    block = 1000
    for start in range(0, draws, block):
        for row in range(distributions):
            uniforms = label_uniforms(np.arange(start, start + block), seed=row, sequence_id="draws")
            targets, _ = sketch(logits[row].expand(block, -1), settings, uniforms=uniforms)
            entries = stored_entries(targets, settings)
            total[row] += np.bincount(entries.ids, weights=entries.weights, minlength=vocab)
    # A tail entry weighs tau with probability p/tau, so its variance is p (tau - p). Bernstein's inequality for the
    # mean of n draws of a value within [0, tau], and all tokens at once: the test fails by chance once in 10^9.
    log_term = math.log(2 * distributions * vocab * 1e9)
    bound = np.sqrt(2 * np.maximum(target * (TAU - target), 0) * log_term / draws) + TAU * log_term / (3 * draws)
    # The head is exact but for the grid of the tail mass (1/510) and the rounding to steps of it and its neighbours.
    bound += np.where(target >= TAU, 1 / 510 + 0.002 * target, 0)
    assert np.all(np.abs(total / draws - target) <= bound)


def test_head_and_tail_are_those_of_the_definition_walked_token_by_token():
    logits = random_logits(40, 1000)
    uniforms = label_uniforms(np.arange(1, 41), seed=1, sequence_id="walk")
    targets, _ = sketch(logits, uniforms=uniforms)
    heads, tails = rows_of(targets.head_ids, targets.head_count), rows_of(targets.tail_ids, targets.tail_count)
    for row, probabilities in enumerate(torch.softmax(logits, 1).double().numpy()):
        head = [i for i in np.argsort(-probabilities, kind="stable") if probabilities[i] >= TAU]
        assert heads[row].tolist() == head
        running, taken = 0.0, []
        for token, probability in enumerate(probabilities):
            if probability < TAU:
                before, running = running, running + probability
                if math.floor(running / TAU + uniforms[row]) > math.floor(before / TAU + uniforms[row]):
                    taken.append(token)
        assert tails[row].tolist() == taken


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    vocab=st.integers(1, 700),
    tau=st.sampled_from([1.0, 1 / 2, 1 / 7, 1 / 24, 1 / 300]),
    scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    impossible=st.floats(0, 0.95),
    u=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
)
def test_any_distribution_keeps_its_mass_and_its_order(vocab, tau, scale, impossible, u, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, vocab)) * scale
    logits[rng.random((3, vocab)) < impossible] = -np.inf
    logits[:, 0] = 0
    targets, _ = sketch(torch.from_numpy(logits).float(), ThresholdSketch(tau=tau), uniforms=np.full(3, u))
    exact = dense(torch.from_numpy(logits))
    heads, tails = rows_of(targets.head_ids, targets.head_count), rows_of(targets.tail_ids, targets.tail_count)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        sure, close = exact[row] >= tau * (1 + 1e-5), exact[row] >= tau * (1 - 1e-5)
        assert set(np.flatnonzero(sure)) <= set(head.tolist()) <= set(np.flatnonzero(close))
        assert np.all(np.diff(exact[row][head]) <= 1e-6)
        assert np.all(np.diff(tail) > 0)
        assert np.all(exact[row][tail] > 0)
        assert not set(head.tolist()) & set(tail.tolist())
        assert targets.tail_mass[row] == pytest.approx(1 - exact[row][head].sum(), abs=1e-5)
        assert abs(len(tail) - targets.tail_mass[row] / tau) < 1 + 1e-4
    entries = stored_entries(targets, ThresholdSketch(tau=tau))
    mass = np.bincount(np.repeat(np.arange(3), np.diff(entries.offsets)), weights=entries.weights, minlength=3)
    expected = (
        np.where(targets.head_count > 0, 1 - to_mass_grid(targets.tail_mass, tau=tau), 0) + targets.tail_count * tau
    )
    np.testing.assert_allclose(mass, expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0, 200.0])
@pytest.mark.parametrize(
    "kind",
    [
        ThresholdSketch(),
        TopkSketch(kind="topk", k=40),
        NucleusSketch(kind="nucleus", mass=0.99),
        FullSketch(kind="full"),
    ],
    ids=lambda settings: settings.kind,
)
def test_heads_fall_in_probability_however_unlikely_they_are(kind, scale):
    logits = random_logits(100, 333, scale=scale)
    targets, _ = sketch(logits, kind)
    exact = logits.double().numpy()
    logprobs = rows_of(targets.head_logprobs, targets.head_count)
    for row, ids in enumerate(rows_of(targets.head_ids, targets.head_count)):
        assert np.all(np.diff(logprobs[row]) <= 0)
        possible = logprobs[row] > -80  # below that float32 has no probabilities
        assert np.all(np.diff(exact[row][ids[possible]]) <= 1e-4 * scale)
    stored_entries(targets, kind)


def test_no_rows_give_no_targets():
    for kind in (ThresholdSketch(), TopkSketch(kind="topk", k=4)):
        targets, fidelity = sketch(torch.zeros(0, 70), kind, uniforms=np.zeros((1, 0)), labels=torch.zeros(0).long())
        assert targets.num_labels == fidelity.num_labels == 0


def test_draws_are_independent_tails_over_one_head():
    logits = random_logits(60, 700, scale=1.5)
    uniforms = np.stack([label_uniforms(np.arange(1, 61), seed=2, sequence_id="d", draw=draw) for draw in range(3)])
    targets, _ = sketch(logits, ThresholdSketch(draws=3), uniforms=uniforms)
    assert targets.draws == 3
    for draw in range(3):
        alone, _ = sketch(logits, uniforms=uniforms[draw])
        chosen = targets.of_draw(draw)
        for name in ("head_ids", "head_logprobs", "tail_count", "tail_ids", "tail_mass"):
            np.testing.assert_array_equal(getattr(chosen, name), getattr(alone, name))
    first, second = (
        set(enumerate(map(tuple, rows_of(one.tail_ids, one.tail_count))))
        for one in (targets.of_draw(0), targets.of_draw(1))
    )
    assert len(first & second) < 10


def test_temperature_divides_the_logits():
    logits = random_logits(10, 300)
    ours, _ = sketch(logits, temperature=1.7)
    theirs, _ = sketch(logits / 1.7)
    for name in ("head_ids", "tail_ids", "head_count", "tail_count"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-5)


def test_large_vocabulary_in_half_precision_is_walked_to_its_end():
    vocab = 262_144
    logits = random_logits(2, vocab, scale=1.0).to(torch.bfloat16)
    targets, _ = sketch(logits, uniforms=np.array([0.1, 0.9]))
    exact = dense(logits)
    for row, tail in enumerate(rows_of(targets.tail_ids, targets.tail_count)):
        # The k-th entry is where the running sum reaches (k - u) tau: its place in the sum, to float32's rounding.
        reached = exact[row].cumsum()[tail] / TAU + [0.1, 0.9][row]
        assert np.all(np.abs(reached - np.arange(1, len(tail) + 1)) <= exact[row][tail] / TAU + 1e-4)
        assert len(tail) in (23, 24)


def test_rows_of_a_wider_tensor_are_read_where_they_lie():
    wide = random_logits(9, 1000)
    ours, _ = sketch(wide[::2, 100:500])
    theirs, _ = sketch(wide[::2, 100:500].clone())
    np.testing.assert_array_equal(ours.tail_ids, theirs.tail_ids)
    transposed, _ = sketch(wide[::2, 100:500].T.contiguous().T)
    np.testing.assert_array_equal(transposed.tail_ids, theirs.tail_ids)


def test_mass_by_rank_is_that_of_the_sampled_rows():
    logits = random_logits(40, 900)
    uniforms = np.full(40, 0.5)
    uniforms[[4, 31]] = 0.001
    _, fidelity = sketch(logits, uniforms=uniforms)
    ranked = -np.sort(-dense(logits)[[4, 31]], axis=1)
    assert fidelity.num_ranked == 2
    for rank in (1, 8, 64, 512):
        assert getattr(fidelity, f"mass_{rank}") == pytest.approx(ranked[:, :rank].sum(), abs=1e-5)


def test_per_label_values_agree_with_a_dense_computation():
    logits = random_logits(30, 777)
    labels = torch.arange(30) * 7
    targets, _ = sketch(logits, labels=labels)
    target = dense(logits)
    picked = target[np.arange(30), labels.numpy()]
    np.testing.assert_allclose(targets.label_logprob, np.log(picked), atol=2e-6)
    np.testing.assert_allclose(targets.entropy, -(target * np.log(target)).sum(1), atol=1e-5)
    np.testing.assert_allclose(targets.tail_mass, np.where(target < TAU, target, 0).sum(1), atol=1e-6)
    rows = np.repeat(np.arange(30), targets.head_count)
    np.testing.assert_allclose(targets.head_logprobs, np.log(target[rows, targets.head_ids]), atol=2e-6)


def test_number_of_tail_entries_is_the_tail_mass_in_units_of_tau():
    targets, _ = sketch(random_logits(200, 300, scale=1.0), uniforms=np.linspace(0, 0.999, 200))
    units = targets.tail_mass.astype(np.float64) / TAU
    assert np.all(targets.tail_count >= np.floor(units - 1e-5))
    assert np.all(targets.tail_count <= np.ceil(units + 1e-5))


def test_one_token_with_all_the_mass_is_the_whole_sketch():
    logits = torch.full((1, 200), -80.0)
    logits[0, 7] = 40.0
    targets, fidelity = sketch(logits)
    assert targets.head_ids.tolist() == [7]
    assert targets.head_logprobs.tolist() == [0.0]
    assert targets.tail_mass.tolist() == [0.0]
    assert targets.tail_count.tolist() == [0]
    assert fidelity.squared_error == pytest.approx(0, abs=1e-12)


def test_flat_distribution_has_no_head_and_a_tail_of_mass_one():
    targets, _ = sketch(torch.zeros(50, 4096), uniforms=np.linspace(0, 0.99, 50))
    assert targets.head_count.tolist() == [0] * 50
    assert targets.tail_mass.tolist() == [1.0] * 50
    assert set(targets.tail_count.tolist()) == {24}


def test_tokens_with_no_probability_are_never_stored():
    logits = random_logits(64, 400)
    logits[:, 100:] = -torch.inf
    targets, _ = sketch(logits, uniforms=np.linspace(0, 0.99, 64))
    assert targets.tail_ids.max() < 100
    assert np.isfinite(targets.entropy).all()
    assert np.isfinite(targets.head_logprobs).all()


def test_impossible_label_has_a_log_probability_that_can_be_added_up():
    logits = torch.zeros(1, 10)
    logits[0, 3] = -torch.inf
    targets, _ = sketch(logits, labels=torch.tensor([3]))
    assert targets.label_logprob.tolist() == [-1000]


def test_padded_vocabulary_is_left_out():
    logits = random_logits(5, 300)
    padded = torch.cat([logits, torch.full((5, 20), 50.0)], 1)
    ours, _ = sketch(padded, vocab_size=300)
    theirs, _ = sketch(logits)
    for name in ("head_ids", "tail_ids", "head_logprobs", "tail_mass", "entropy"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_logits_name_sequence_and_position(bad):
    logits = random_logits(20, 50)
    logits[17, 3] = bad
    with pytest.raises(LogitsInvalid, match=r"sequence seq, position 17"):
        sketch(logits)


def test_row_with_nothing_possible_is_an_error():
    logits = random_logits(3, 50)
    logits[2] = -torch.inf
    with pytest.raises(LogitsInvalid, match="position 2"):
        sketch(logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_reduced_in_float32(dtype):
    logits = random_logits(12, 256).to(dtype)
    ours, _ = sketch(logits)
    theirs, _ = sketch(logits.float())
    np.testing.assert_array_equal(ours.head_ids, theirs.head_ids)
    np.testing.assert_array_equal(ours.tail_ids, theirs.tail_ids)


def test_rows_do_not_change_with_the_rows_beside_them():
    logits = random_logits(45, 640)
    uniforms = label_uniforms(np.arange(1, 46), seed=5, sequence_id="rows")
    whole, _ = sketch(logits, uniforms=uniforms)
    single = concatenate([sketch(logits[i : i + 1], uniforms=uniforms[i : i + 1])[0] for i in range(45)])
    for name in ("head_ids", "tail_ids", "head_count", "tail_count", "tail_mass", "label_logprob"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(single, name))


def test_split_undoes_concatenate():
    targets, _ = sketch(random_logits(10, 300))
    pieces = split_rows(targets, [3, 0, 7])
    assert [len(piece.entropy) for piece in pieces] == [3, 0, 7]
    again = concatenate(pieces)
    np.testing.assert_array_equal(again.tail_ids, targets.tail_ids)
    np.testing.assert_array_equal(again.head_logprobs, targets.head_logprobs)


def test_topk_keeps_the_most_likely_and_the_exact_rest():
    logits = random_logits(9, 500)
    targets, _ = sketch(logits, TopkSketch(kind="topk", k=16))
    target = dense(logits)
    for row, ids in enumerate(rows_of(targets.head_ids, targets.head_count)):
        assert ids.tolist() == np.argsort(-target[row])[:16].tolist()
        assert targets.tail_mass[row] == pytest.approx(1 - target[row][ids].sum(), abs=1e-6)
    assert not len(targets.tail_ids)


def test_topk_of_more_than_there_is_takes_everything():
    targets, _ = sketch(random_logits(2, 10), TopkSketch(kind="topk", k=64))
    assert targets.head_count.tolist() == [10, 10]
    np.testing.assert_allclose(targets.tail_mass, 0, atol=1e-6)


def test_nucleus_is_the_smallest_set_with_the_mass_unless_it_is_cut():
    logits = random_logits(20, 400, scale=2.0)
    targets, _ = sketch(logits, NucleusSketch(kind="nucleus", mass=0.9, max_entries=30))
    target = np.sort(dense(logits), axis=1)[:, ::-1]
    for row, count in enumerate(targets.head_count):
        needed = int(np.searchsorted(np.cumsum(target[row]), 0.9 - 1e-9)) + 1
        assert count == min(needed, 30)


def test_full_keeps_every_token_and_its_kl_is_only_rounding():
    logits = random_logits(6, 300)
    targets, fidelity = sketch(logits, FullSketch(kind="full", step=0.02))
    assert targets.head_count.tolist() == [300] * 6
    assert all(sorted(ids.tolist()) == list(range(300)) for ids in rows_of(targets.head_ids, targets.head_count))
    assert 0 < fidelity.kl_nats / 6 < 0.02**2 / 8  # rounding within half a step changes log p by at most .01


@pytest.mark.parametrize(
    "settings",
    [ThresholdSketch(), TopkSketch(kind="topk", k=8), NucleusSketch(kind="nucleus"), FullSketch(kind="full")],
    ids=lambda settings: settings.kind,
)
def test_fidelity_agrees_with_a_dense_computation(settings):
    logits = random_logits(25, 350)
    uniforms = label_uniforms(np.arange(1, 26), seed=9, sequence_id="f")
    targets, fidelity = sketch(logits, settings, uniforms=uniforms)
    entries = stored_entries(targets, settings)
    stored = np.zeros((25, 350))
    np.add.at(stored, (np.repeat(np.arange(25), np.diff(entries.offsets)), entries.ids), entries.weights)
    target, uniform = dense(logits), 1 / 350
    first, second = uniform - target, uniform - stored
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert fidelity.squared_error == pytest.approx(((stored - target) ** 2).sum(), rel=1e-3, abs=1e-6)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1))).sum()
    assert fidelity.angle_degrees == pytest.approx(angle, rel=1e-3, abs=25 * 0.05)
    assert fidelity.num_entries == len(entries.ids)
    assert fidelity.num_labels == 25
