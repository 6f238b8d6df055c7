"""Targets that left an engine as one flat tensor are the targets that went in, bit for bit."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from softshard.errors import LogitsInvalid
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets
from softshard.teacher.vllm_wire import pack_invalid, pack_targets, unpack


def some_targets(rng, labels, *, draws=1, heads=3, tails=4):
    head_count = rng.integers(0, heads + 1, labels).astype(np.int32)
    tail_count = rng.integers(0, tails + 1, draws * labels).astype(np.int32)
    number = lambda size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    ids = lambda size: rng.integers(0, 2**31, size).astype(np.int32)  # noqa: E731
    return SequenceTargets(
        label_logprob=number(labels),
        entropy=number(labels),
        tail_mass=number(labels),
        head_count=head_count,
        tail_count=tail_count,
        head_ids=ids(head_count.sum()),
        head_logprobs=number(head_count.sum()),
        tail_ids=ids(tail_count.sum()),
    )


def some_sums(rng, labels):
    values = {name: float(value) for name, value in zip(asdict(FidelitySums()), rng.normal(size=10) * 1e9, strict=True)}
    return FidelitySums(**{**values, "num_labels": labels, "num_entries": 2**40 + 1, "num_ranked": 3})


def assert_same_bits(one, other):
    for name, value in asdict(one).items():
        expected = getattr(other, name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value.view(np.int32), expected.view(np.int32), err_msg=name)


@pytest.mark.parametrize(
    ("labels", "draws", "heads", "tails"), [(1, 1, 3, 4), (9, 3, 3, 4), (5, 1, 0, 4), (5, 2, 3, 0)]
)
def test_one_record_comes_back_as_it_went(labels, draws, heads, tails):
    rng = np.random.default_rng(labels)
    targets, sums = some_targets(rng, labels, draws=draws, heads=heads, tails=tails), some_sums(rng, labels)
    chain = pack_targets(targets, sums, setting=0)
    assert chain.dtype == torch.int32
    ((back, back_sums),) = unpack(chain, sequence_id="s", num_settings=1)
    assert_same_bits(back, targets)
    assert back_sums == sums


def test_every_pattern_of_bits_survives():
    rng = np.random.default_rng(0)
    targets = some_targets(rng, 4)
    odd = np.array([0x7FC00001, -0x80000000, 1, -1], dtype=np.int32)  # a NaN with a load, -0, a denormal, another NaN
    targets.label_logprob[:] = odd.view(np.float32)
    ((back, _),) = unpack(pack_targets(targets, FidelitySums(), setting=0), sequence_id="s", num_settings=1)
    np.testing.assert_array_equal(back.label_logprob.view(np.int32), odd)


def test_a_chain_of_pieces_is_the_whole_for_each_setting():
    rng = np.random.default_rng(1)
    first = [(some_targets(rng, size, draws=2), some_sums(rng, size)) for size in (3, 1, 5)]
    second = [(some_targets(rng, size), some_sums(rng, size)) for size in (3, 1, 5)]
    records = [
        pack_targets(targets, sums, setting=setting)
        for pair in zip(first, second, strict=True)
        for setting, (targets, sums) in enumerate(pair)
    ]
    whole = unpack(torch.cat(records), sequence_id="s", num_settings=2)
    for (back, sums), pieces in zip(whole, (first, second), strict=True):
        assert back.num_labels == 9
        np.testing.assert_array_equal(back.head_ids, np.concatenate([targets.head_ids for targets, _ in pieces]))
        for draw in range(back.draws):
            tails = [targets.of_draw(draw).tail_ids for targets, _ in pieces]
            np.testing.assert_array_equal(back.of_draw(draw).tail_ids, np.concatenate(tails))
        assert sums == pieces[0][1] + pieces[1][1] + pieces[2][1]


def test_invalid_logits_are_raised_where_the_teacher_is():
    rng = np.random.default_rng(2)
    good = pack_targets(some_targets(rng, 3), FidelitySums(), setting=0)
    bad = pack_invalid(position=70_001, value=float("inf"), setting=0)
    with pytest.raises(LogitsInvalid, match=r"sequence abc, position 70001: .* inf") as caught:
        unpack(torch.cat([good, bad]), sequence_id="abc", num_settings=1)
    assert caught.value.value == float("inf")
