"""Several target sets: their batches in turn (mix), or their targets of the same sequences combined (blend)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fakes.targets import VOCAB, numbered_parts, numbers_in, random_distributions, sketch, write_targets
from softshard.data.blend import Blend
from softshard.data.dataset import SoftLabelDataset
from softshard.data.filters import RowFilter
from softshard.data.mix import MixWeights, SoftLabelMix
from softshard.data.target_set import TargetSet
from softshard.data.text import endless
from softshard.errors import BlendIncomplete, BlendInvalid, ResumeMismatch

SETTINGS = {"seed": 1, "batch_tokens": 32, "shuffle_buffer": 20, "alpha": 0.4}
ALONE = {"rank": 0, "world_size": 1, "prefetch": 0}


def target_set(folder, parts, **settings):
    store, manifest = write_targets(folder, parts, **settings)
    return TargetSet(store=store, manifest=manifest)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """70 and 25 sequences."""
    return [
        target_set(tmp_path_factory.mktemp("set"), numbered_parts(np.random.default_rng(seed), sizes))
        for seed, sizes in ((0, (40, 30)), (1, (25,)))
    ]


def mix(two_sets, weights, **place):
    sets = [SoftLabelDataset(one, **SETTINGS, **ALONE) for one in two_sets]
    return SoftLabelMix(sets, weights, **{**ALONE, **place})


def tokens_by_set(data, epoch):
    turns = data.turns(epoch)
    batches = list(itertools.islice(data, len(turns)))
    return turns, [
        sum(batch.num_tokens for turn, batch in zip(turns, batches, strict=True) if turn.source == source)
        for source in (0, 1)
    ]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_each_set_has_its_share_of_the_tokens_at_any_time(two_sets, share):
    data = mix(two_sets, MixWeights.constant(share, 1 - share))
    turns, batches = data.turns(0), list(data)
    given = np.zeros(2)
    for turn, batch in zip(turns, batches, strict=True):
        given[turn.source] += batch.num_tokens
        assert abs(given[0] - share * given.sum()) <= 2 * SETTINGS["batch_tokens"]


def test_batches_of_a_set_come_in_its_own_order_and_all_come_before_any_comes_again(two_sets):
    data = mix(two_sets, MixWeights.constant(0.5, 0.5))
    given = [[], []]
    for epoch in (0, 1):
        for turn, batch in zip(data.turns(epoch), list(data), strict=True):
            given[turn.source].append(numbers_in(batch))
    for source, one in enumerate(two_sets):
        own = SoftLabelDataset(one, **SETTINGS, **ALONE)
        expected = itertools.islice(endless(own), len(given[source]))
        assert given[source] == [numbers_in(batch) for batch in expected]


def test_an_epoch_has_as_many_tokens_as_the_sets_together(two_sets):
    data = mix(two_sets, MixWeights.constant(0.3, 0.7))
    whole = sum(int(SoftLabelDataset(one, **SETTINGS, **ALONE).epoch_order(0).tokens.sum()) for one in two_sets)
    for epoch in (0, 1, 2):
        _, given = tokens_by_set(data, epoch)
        assert whole <= sum(given) < whole + SETTINGS["batch_tokens"]


def test_weights_change_along_their_breakpoints(two_sets):
    weights = MixWeights(points=((0, (1.0, 0.0)), (10, (1.0, 0.0)), (11, (0.0, 1.0))))
    turns = mix(two_sets, weights).turns(0)
    assert [turn.source for turn in turns[:15]] == [0] * 11 + [1] * 4
    between = MixWeights(points=((0, (1.0, 3.0)), (4, (3.0, 1.0))))
    assert between.shares(2) == pytest.approx([0.5, 0.5])
    assert between.shares(100) == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_mix_resumes_after_any_step_on_any_number_of_ranks(two_sets, world_size):
    weights = MixWeights(points=((0, (1.0, 1.0)), (20, (0.2, 0.8))))
    data = mix(two_sets, weights)
    whole = [numbers_in(batch) for batch in itertools.islice(endless(data), sum(data.num_batches(e) for e in (0, 1)))]
    first = mix(two_sets, weights).num_batches(0)
    for stopped_at in (0, 1, 5):
        before = mix(two_sets, weights, world_size=world_size)
        for _ in itertools.islice(endless(before), stopped_at):
            pass
        state = before.state_dict()
        assert state["consumed"] == stopped_at * world_size
        for then in (1, 2, 3):
            rest = []
            for rank in range(then):
                resumed = mix(two_sets, weights, rank=rank, world_size=then)
                resumed.load_state_dict(state)
                rest.append([numbers_in(batch) for batch in resumed])
            together = [names for step in zip(*rest, strict=True) for names in step if names]
            assert together == whole[state["consumed"] : first]
    late = mix(two_sets, weights)
    late.set_epoch(1)
    assert [numbers_in(batch) for batch in late] == whole[first:]


def test_a_state_of_other_weights_is_refused(two_sets):
    state = mix(two_sets, MixWeights.constant(1, 2)).state_dict()
    with pytest.raises(ResumeMismatch, match="weights"):
        mix(two_sets, MixWeights.constant(1, 3)).load_state_dict(state)


@pytest.mark.parametrize("points", [(), ((0, (0.0, 0.0)),), ((1, (1.0, 1.0)), (0, (1.0, 1.0))), ((0, (-1.0, 2.0)),)])
def test_weights_that_say_nothing_are_refused(points):
    with pytest.raises(ValueError, match="numbers must rise"):
        MixWeights(points=points)


@pytest.fixture(scope="module")
def scored_twice(tmp_path_factory):
    """The same 33 sequences under two teachers; the second one's parts are cut elsewhere and lie in another order."""
    rng = np.random.default_rng(5)
    (first,) = numbered_parts(rng, (33,))
    second = [
        (tokens, sketch(random_distributions(rng, tokens.num_labels), tokens.labels, kind="threshold", rng=rng))
        for tokens, _ in first
    ]
    cut = [first[:20], first[20:]], [second[25:], second[4:25], second[:4]]
    sets = [target_set(tmp_path_factory.mktemp("set"), parts) for parts in cut]
    return sets, first, second


def by_hand(tokens, targets, label):
    """[V] the sketch of one label from the format's own formula."""
    p = np.zeros(VOCAB)
    heads, tails = ([0, *np.cumsum(counts).tolist()] for counts in (targets.head_count, targets.tail_count))
    ids, logprobs = (a[heads[label] : heads[label + 1]] for a in (targets.head_ids, targets.head_logprobs))
    np.add.at(p, ids, (1 - targets.tail_mass[label]) * np.exp(logprobs) / np.exp(logprobs).sum() if len(ids) else 0)
    np.add.at(p, targets.tail_ids[tails[label] : tails[label + 1]], 1 / 8)
    return p


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_blend_is_the_weighted_mean_of_the_teachers_label_by_label(scored_twice, alpha):
    sets, first, second = scored_twice
    blend = Blend(sets=tuple(sets), weights=(1.0, 3.0))
    seen = []
    for batch in SoftLabelDataset(blend, **{**SETTINGS, "alpha": alpha}, **ALONE):
        rows = torch.repeat_interleave(batch.entry_offsets.diff())
        dense = np.zeros((len(batch.labels), VOCAB))
        np.add.at(dense, (rows.numpy(), batch.entry_ids.numpy()), batch.entry_weights.numpy())
        place = 0
        for number in numbers_in(batch):
            (tokens, one), (_, other) = first[number], second[number]
            for label in range(tokens.num_labels):
                mixed = 0.25 * by_hand(tokens, one, label) + 0.75 * by_hand(tokens, other, label)
                expected = (1 - alpha) * mixed + alpha * np.eye(VOCAB)[tokens.labels[label]]
                np.testing.assert_allclose(dense[place], expected, atol=0.02)
                place += 1
            seen.append(number)
    assert sorted(seen) == list(range(33))


def test_a_blend_has_the_order_and_the_resume_of_one_set(scored_twice):
    blend = Blend(sets=tuple(scored_twice[0]), weights=(1.0, 1.0))
    whole = [numbers_in(batch) for batch in SoftLabelDataset(blend, **SETTINGS, **ALONE)]
    data = SoftLabelDataset(blend, **SETTINGS, **ALONE)
    for _ in itertools.islice(data, 3):
        pass
    resumed = SoftLabelDataset(blend, **SETTINGS, **ALONE)
    resumed.load_state_dict(data.state_dict())
    assert [numbers_in(batch) for batch in resumed] == whole[3:]


def test_a_blend_of_one_teacher_with_itself_is_that_teacher(scored_twice):
    one = scored_twice[0][0]
    blend = Blend(sets=(one, one), weights=(0.5, 0.5))
    once, twice = (list(SoftLabelDataset(targets, **SETTINGS, **ALONE)) for targets in (one, blend))
    sums = [sum(float(batch.entry_weights.sum()) for batch in batches) for batches in (once, twice)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    labels, entries = (sum(len(getattr(b, name)) for b in once) for name in ("labels", "entry_ids"))
    assert sum(len(batch.entry_ids) for batch in twice) == labels + 2 * (entries - labels)


def test_sets_that_do_not_cover_each_other_are_named_with_what_they_lack(scored_twice, tmp_path):
    _, first, second = scored_twice
    whole = target_set(tmp_path / "whole", [first])
    short = target_set(tmp_path / "short", [second[:-2]])
    with pytest.raises(BlendIncomplete, match="lacks 2 of 33") as caught:
        SoftLabelDataset(Blend(sets=(whole, short), weights=(1, 1)), **SETTINGS, **ALONE).batches_per_epoch(0)
    count, some = caught.value.missing[str(tmp_path / "short")]
    assert (count, len(some)) == (2, 2)
    assert str(tmp_path / "whole") not in caught.value.missing


def test_ghosts_of_two_teachers_are_refused_and_renormalised_heads_are_not(tmp_path):
    parts = numbered_parts(np.random.default_rng(0), (6,), kind="topk")
    sets = tuple(target_set(tmp_path / name, parts, kind="topk") for name in "ab")
    blend = Blend(sets=sets, weights=(1, 1))
    with pytest.raises(BlendInvalid, match="ghost"):
        SoftLabelDataset(blend, **SETTINGS, **ALONE).batches_per_epoch(0)
    batch = next(iter(SoftLabelDataset(blend, **SETTINGS, **ALONE, truncated="renormalise")))
    sums = torch.zeros(len(batch.labels)).index_add_(
        0, torch.repeat_interleave(batch.entry_offsets.diff()), batch.entry_weights
    )
    torch.testing.assert_close(sums, torch.ones(len(batch.labels)))


def test_the_first_sets_filter_says_which_sequences_of_a_blend_take_part(scored_twice):
    sets, first, _ = scored_twice
    chosen = RowFilter(mean_entropy=(2.5, 9.0))
    expected = [n for n, (_, targets) in enumerate(first) if targets.entropy.mean() >= 2.5]
    assert 0 < len(expected) < 33
    blend = Blend(sets=(replace(sets[0], where=chosen), sets[1]), weights=(1, 1))
    given = [n for batch in SoftLabelDataset(blend, **SETTINGS, **ALONE) for n in numbers_in(batch)]
    assert len(set(given) ^ set(expected)) <= 1, "a mean may lie on the border, where the grid decides"
