from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fakes.targets import VOCAB, metadata, random_distributions, row, sequence, sketch
from softshard.data.batch import collate, collate_text
from softshard.data.mixing import Mixing


def rows_of(kind, *, first_label=1):
    rng = np.random.default_rng(3)
    return [row(f"{n}", length, rng, kind=kind, first_label=first_label) for n, length in enumerate((7, 4, 9))]


def expected_targets(rows, *, alpha, kind, truncated="ghost", tau=1 / 8):
    """[N, V] mixed targets, label by label, from the format's own formula, and [N] what is left to the ghost."""
    dense, ghosts = [], []
    for tokens, targets in rows:
        head = tail = 0
        for label, token in enumerate(tokens.labels.tolist()):
            p, left = np.zeros(VOCAB), float(targets.tail_mass[label])
            ids = targets.head_ids[head : head + targets.head_count[label]].tolist()
            relative = [math.exp(q) for q in targets.head_logprobs[head : head + targets.head_count[label]]]
            head_mass = 1.0 if truncated == "renormalise" and kind in ("topk", "nucleus") else 1 - left
            for i, r in zip(ids, relative, strict=True):
                p[i] += head_mass * r / sum(relative)
            for i in targets.tail_ids[tail : tail + targets.tail_count[label]].tolist():
                p[i] += tau
            head, tail = head + targets.head_count[label], tail + targets.tail_count[label]
            mixed = (1 - alpha) * p
            mixed[token] += alpha
            dense.append(mixed)
            ghosts.append((1 - alpha) * left)
    return np.array(dense), np.array(ghosts)


def dense_of(batch):
    dense = np.zeros((len(batch.labels), VOCAB))
    counts = batch.entry_offsets.diff()
    for label, token, weight in zip(
        torch.arange(len(counts)).repeat_interleave(counts).tolist(),
        batch.entry_ids.tolist(),
        batch.entry_weights.tolist(),
        strict=True,
    ):
        dense[label, token] += weight
    return dense


@pytest.mark.parametrize("first_label", [1, 3])
def test_each_position_is_the_one_before_its_label(first_label):
    rows = rows_of("threshold", first_label=first_label)
    batch = collate(rows, metadata=metadata(), mixing=Mixing(alpha=0.5, truncated="ghost"))
    assert batch.input_ids.shape == (3, 9)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.positions + 1], batch.labels)
    places = [(int(p) // 9, int(p) % 9) for p in batch.positions]
    assert places == [(b, t) for b, length in enumerate((7, 4, 9)) for t in range(first_label - 1, length - 1)]


MASKS = (((2, 3), (5, 7)), ((1, 4),), ((1, 2), (4, 6), (8, 9)))


def masked_rows(kind):
    """Rows in which context lies between the labels."""
    rng = np.random.default_rng(3)
    lengths = zip((7, 4, 9), MASKS, strict=True)
    return [row(f"{n}", length, rng, kind=kind, label_spans=spans) for n, (length, spans) in enumerate(lengths)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_only_labels_have_targets_where_context_lies_between_them(kind, packing):
    rows = masked_rows(kind)
    batch = collate(rows, metadata=metadata(kind), mixing=Mixing(alpha=0.3, truncated="ghost"), packing=packing)
    starts = (0, 7, 11) if packing else (0, 9, 18)
    places = [at + i - 1 for at, spans in zip(starts, MASKS, strict=True) for span in spans for i in range(*span)]
    assert batch.positions.tolist() == places
    assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.labels)
    np.testing.assert_array_equal(batch.labels, np.concatenate([tokens.labels for tokens, _ in rows]))
    dense, _ = expected_targets(rows, alpha=0.3, kind=kind)
    np.testing.assert_allclose(dense_of(batch), dense, rtol=1e-5, atol=1e-6)
    text = collate_text([tokens for tokens, _ in rows], packing=packing)
    assert torch.equal(text.positions, batch.positions)
    np.testing.assert_array_equal(dense_of(text), np.eye(VOCAB)[batch.labels.numpy()])


def test_padding_is_on_the_right_and_masked():
    batch = collate_text([sequence("a", [5, 6, 7]), sequence("b", [8, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.num_tokens == 5


@pytest.mark.parametrize("kind", ["threshold", "topk", "nucleus", "full"])
@pytest.mark.parametrize("truncated", ["ghost", "renormalise"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_targets_are_the_label_and_the_sketch_mixed(kind, truncated, alpha):
    rows = rows_of(kind)
    batch = collate(rows, metadata=metadata(kind), mixing=Mixing(alpha=alpha, truncated=truncated))
    dense, ghost = expected_targets(rows, alpha=alpha, kind=kind, truncated=truncated)
    np.testing.assert_allclose(dense_of(batch), dense, rtol=1e-5, atol=1e-6)
    if truncated == "ghost" and kind in ("topk", "nucleus"):
        np.testing.assert_allclose(batch.targets.tail_mass.numpy(), ghost, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dense_of(batch).sum(axis=1) + batch.targets.tail_mass.numpy(), 1, atol=1e-5)
    else:
        assert batch.targets.tail_mass is None
        assert batch.targets.entry_in_head is None
        if kind != "threshold":
            np.testing.assert_allclose(dense_of(batch).sum(axis=1), 1, atol=1e-5)


def test_temperature_at_load_is_that_of_the_logits_for_a_full_target():
    rng = np.random.default_rng(8)
    tokens = sequence("a", rng.integers(VOCAB, size=9))
    distributions = random_distributions(rng, tokens.num_labels)
    rows = [(tokens, sketch(distributions, tokens.labels, kind="full", rng=rng))]
    batch = collate(rows, metadata=metadata("full"), mixing=Mixing(alpha=0.0, truncated="ghost", temperature=2.5))
    softer = distributions ** (1 / 2.5)
    np.testing.assert_allclose(dense_of(batch), softer / softer.sum(1, keepdims=True), rtol=1e-5)


def test_a_threshold_sketch_keeps_its_own_mass():
    rows = rows_of("threshold")
    masses = dense_of(collate(rows, metadata=metadata(), mixing=Mixing(alpha=0, truncated="renormalise"))).sum(axis=1)
    assert (np.abs(masses - 1) > 1e-3).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_ghost_stands_for_all_but_the_stored_head(alpha):
    rows = rows_of("topk")
    batch = collate(rows, metadata=metadata("topk"), mixing=Mixing(alpha=alpha, truncated="ghost"))
    in_head = batch.entry_ids[batch.targets.entry_in_head].tolist()
    assert in_head == [token for _, targets in rows for token in targets.head_ids.tolist()]
    assert batch.entry_ids[~batch.targets.entry_in_head].tolist() == (batch.labels.tolist() if alpha else [])


def test_alpha_one_is_the_corpus_token_alone():
    rows = rows_of("topk")
    batch = collate(rows, metadata=metadata("topk"), mixing=Mixing(alpha=1, truncated="ghost"))
    plain = collate_text([tokens for tokens, _ in rows])
    assert batch.targets.tail_mass is None
    np.testing.assert_array_equal(dense_of(batch), np.eye(VOCAB)[batch.labels.numpy()])
    assert torch.equal(batch.entry_ids, plain.entry_ids)
    assert torch.equal(batch.input_ids, plain.input_ids)


def test_a_batch_without_weight_is_the_same_but_counts_for_nothing():
    batch = collate_text([sequence("a", [5, 6, 7])])
    filler = batch.without_weight()
    assert torch.equal(filler.input_ids, batch.input_ids)
    assert filler.position_weights.tolist() == [0, 0]
    assert filler.num_tokens == 0
    assert batch.position_weights.tolist() == [1, 1]
