"""Where slices end: by what the sequences are, so that a change moves the cuts nearby and no others."""

import itertools
import random

import pytest

from softshard.corpus.boundaries import SliceCutter


def ends(ids, *, most):
    """Places after which a slice ends, that of the last one included."""
    cut, found, before = SliceCutter(max_length=most), [], 0
    for sequence_id in ids:
        if length := cut.add(sequence_id):
            before += length
            found.append(before)
    return [*found, before + cut.num_waiting] if cut.num_waiting else found


def some_ids(count, *, seed):
    generator = random.Random(seed)
    return [f"{generator.getrandbits(128):032x}" for _ in range(count)]


def test_cuts_of_a_few_are_those_worked_out_by_hand():
    # Of d a c b, slices of 2, 3 and 4 would end after a, c and b: a is the least. Of c b e f it is b, of e f a d it is
    # a. What is left, d and e, is the last slice.
    assert ends("dacbefade", most=4) == [2, 4, 7, 9]
    assert ends("dacbefad", most=4) == [2, 4, 7, 8]
    assert ends("dac", most=4) == [3]
    assert ends("", most=4) == []
    assert ends("dacb", most=1) == [1, 2, 3, 4]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 25])
def test_every_slice_but_the_last_holds_half_of_the_most_or_more(most):
    cuts = [0, *ends(some_ids(2000, seed=most), most=most)]
    lengths = [end - start for start, end in itertools.pairwise(cuts)]
    assert sum(lengths) == 2000
    assert all(most / 2 <= length <= most for length in lengths[:-1])
    assert 1 <= lengths[-1] <= most
    assert most in lengths


@pytest.mark.parametrize("most", [8, 24, 256])
def test_after_a_change_anywhere_the_cuts_fall_back_into_step(most):
    """And before the change they are as they were; where two cuts fall on one sequence, all after them do."""
    num_apart = []
    for seed in range(60):
        generator = random.Random(f"{most} {seed}")
        before = some_ids(60 * most, seed=f"{most} {seed} before")
        at, new = generator.randrange(len(before) // 2), some_ids(generator.randrange(1, 3 * most), seed=f"{seed} new")
        gone = generator.randrange(0, most)
        after = [*before[:at], *new, *before[at + gone :]]
        shift = len(new) - gone
        old = {end + shift for end in ends(before, most=most) if end >= at + gone}
        now = [end for end in ends(after, most=most) if end >= at + len(new)]
        in_step = next(place for place, end in enumerate(now) if end in old)
        assert set(now[in_step:]) == {end for end in old if end >= now[in_step]}
        assert [end for end in ends(after, most=most) if end <= at - most] == [
            end for end in ends(before, most=most) if end <= at - most
        ]
        num_apart.append(in_step)
    assert sum(num_apart) / len(num_apart) < 3
    assert max(num_apart) < 16
