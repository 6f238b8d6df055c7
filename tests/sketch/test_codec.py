import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshard.sketch.codec import (
    LOGPROB_GRID,
    MASS_GRID,
    counts_to_offsets,
    decode_head,
    decode_tail,
    encode_head,
    encode_tail,
    frequent_ids,
    head_weights,
    ids_by_rank,
    to_logprob_grid,
    to_mass_grid,
    token_ranks,
)
from softshard.sketch.entries import entries_of
from softshard.sketch.types import SequenceTargets

logprob = st.floats(min_value=-120, max_value=0, width=32)
ragged = st.lists(st.lists(logprob, max_size=12).map(lambda row: sorted(row, reverse=True)), max_size=20)
VOCAB = 262_144
tails = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=40, unique=True), max_size=20)


def arrays(rows, dtype=np.float32):
    counts = np.array([len(row) for row in rows], dtype=np.int32)
    return np.array([value for row in rows for value in row], dtype=dtype), counts


@given(ragged, st.sampled_from([0.005, 0.05, 0.1]))
def test_decoded_steps_are_the_rounded_distances_from_the_most_likely(rows, step):
    logprobs, counts = arrays(rows)
    decoded = decode_head(encode_head(logprobs, counts, step=step), counts)
    expected = [min(round((float(row[0]) - float(q)) / step), 32767) for row in rows for q in np.float32(row)]
    assert np.abs(decoded - np.array(expected, dtype=int)).max(initial=0) <= 1  # a tie may be rounded either way
    nats = np.repeat([row[0] for row in rows if row], counts[counts > 0]) - logprobs
    assert np.all(np.abs(decoded * step - nats) <= step / 2 + 1e-4)


@given(ragged.filter(any), st.floats(0.0, 1.0))
def test_head_weights_sum_to_the_head_mass_whatever_the_rounding(rows, tail):
    logprobs, counts = arrays(rows)
    steps = decode_head(encode_head(logprobs, counts, step=0.05), counts)
    mass = np.full(len(rows), 1 - tail, dtype=np.float32)
    weights = head_weights(-0.05 * steps, counts, mass)
    for row, part in enumerate(np.split(weights, np.cumsum(counts)[:-1])):
        assert part.sum() == pytest.approx(float(mass[row]) if counts[row] else 0, abs=1e-6)
        assert np.all(np.diff(part) <= 0)


def test_a_worked_example():
    # Probabilities .5 and .25 in steps of .1: ln 2 = 6.93 steps apart, so 7 is stored; one entry alone stores nothing.
    logprobs = np.log(np.array([0.5, 0.25, 1.0], dtype=np.float32))
    counts = np.array([2, 0, 1], dtype=np.int32)
    stored = encode_head(logprobs, counts, step=0.1)
    assert stored.tolist() == [7]
    assert decode_head(stored, counts).tolist() == [0, 7, 0]
    weights = head_weights(-0.1 * decode_head(stored, counts), counts, np.array([0.75, 0, 1], dtype=np.float32))
    first = 0.75 / (1 + np.exp(-0.7))
    np.testing.assert_allclose(weights, [first, 0.75 - first, 1.0])


def test_differences_cannot_overflow():
    counts = np.array([3], dtype=np.int32)
    stored = encode_head(np.array([0.0, -1e30, -np.inf], dtype=np.float32), counts, step=0.001)
    assert decode_head(stored, counts).tolist() == [0, 32767, 32767]


def test_unsorted_head_is_refused():
    with pytest.raises(ValueError, match="descending"):
        encode_head(np.array([-2.0, -1.0], dtype=np.float32), np.array([2], dtype=np.int32), step=0.02)


@given(tails)
def test_tails_come_back_sorted_and_their_gaps_are_never_negative(rows):
    ids, counts = arrays(rows, np.int32)
    gaps = encode_tail(ids, counts)
    assert gaps.min(initial=0) >= 0
    assert decode_tail(gaps, counts).tolist() == [token for row in rows for token in sorted(row)]


def test_a_worked_tail():
    assert encode_tail(np.array([9, 2, 5, 7], np.int32), np.array([3, 0, 1], np.int32)).tolist() == [2, 3, 4, 7]


@given(st.lists(st.integers(0, 99), max_size=400))
def test_ranks_and_ids_are_each_others_inverse_and_frequent_ids_come_first(ids):
    often = frequent_ids(np.array(ids, dtype=np.int32), vocab_size=100)
    by_rank = ids_by_rank(often, vocab_size=100)
    assert sorted(by_rank.tolist()) == list(range(100))
    assert token_ranks(by_rank)[by_rank].tolist() == list(range(100))
    counts = [ids.count(token) for token in often.tolist()]
    assert counts == sorted(counts, reverse=True)
    assert min(counts, default=24) >= 24
    assert {token for token in ids if ids.count(token) >= 24} == set(often.tolist())
    assert by_rank[len(often) :].tolist() == sorted(set(range(100)) - set(often.tolist()))


def test_offsets_are_running_sums():
    assert counts_to_offsets(np.array([2, 0, 3], dtype=np.int32)).tolist() == [0, 2, 2, 5]


@given(st.floats(-50, 0, width=32), st.floats(0, 1, width=32))
def test_grids_are_off_by_at_most_half_a_step(logprob, mass):
    assert abs(float(to_logprob_grid(np.float32([logprob]))[0]) - logprob) <= LOGPROB_GRID / 2
    assert abs(float(to_mass_grid(np.float32([mass]))[0]) - mass) <= MASS_GRID / 2 + 1e-7


def test_no_mass_and_all_mass_are_on_the_grid_of_256_values():
    grid = to_mass_grid(np.linspace(0, 1, 10_000, dtype=np.float32))
    assert len(np.unique(grid)) == 256
    assert (grid[0], grid[-1]) == (0, 1)


@pytest.mark.parametrize("n", [2, 24, 31, 32, 100, 1000, 32768])
def test_rounding_the_mass_changes_the_smallest_head_by_at_most_a_sixteenth(n):
    tau = 1 / n
    mass = np.linspace(0, 1 - tau, 999, dtype=np.float32)
    head = 1 - to_mass_grid(mass, tau=tau).astype(np.float64)
    assert np.abs(head / (1 - mass.astype(np.float64)) - 1).max() <= 1 / 16 + 1e-3


def some_targets(**changes):
    values = {
        "label_logprob": np.zeros(3, np.float32),
        "entropy": np.zeros(3, np.float32),
        "tail_mass": np.array([0.25, 1.0, 0.0], np.float32),
        "head_count": np.array([2, 0, 1], np.int32),
        "tail_count": np.array([1, 2, 0], np.int32),
        "head_ids": np.array([5, 6, 7], np.int32),
        "head_logprobs": np.array([-0.70, -1.40, 0.0], np.float32),
        "tail_ids": np.array([1, 2, 3], np.int32),
    }
    return SequenceTargets(**(values | changes))


def test_entries_are_head_then_tail_of_each_label():
    entries = entries_of(some_targets(), tau=0.25)
    assert entries.ids.tolist() == [5, 6, 1, 2, 3, 7]
    assert entries.offsets.tolist() == [0, 3, 5, 6]
    first = 0.75 * np.exp(-0.70) / (np.exp(-0.70) + np.exp(-1.40))
    np.testing.assert_allclose(entries.weights, [first, 0.75 - first, 0.25, 0.25, 0.25, 1.0], rtol=1e-6)


def test_each_draw_has_the_same_heads_and_tails_of_its_own():
    targets = some_targets(
        tail_count=np.array([1, 2, 0, 1, 1, 1], np.int32), tail_ids=np.array([1, 2, 3, 8, 9, 10], np.int32)
    )
    assert targets.draws == 2
    assert entries_of(targets, tau=0.25, draw=0).ids.tolist() == [5, 6, 1, 2, 3, 7]
    assert entries_of(targets, tau=0.25, draw=1).ids.tolist() == [5, 6, 8, 9, 7, 10]
    assert entries_of(targets, tau=0.25, draw=2).ids.tolist() == [5, 6, 1, 2, 3, 7]


def test_temperature_at_load_is_that_power_of_the_head():
    targets = some_targets(
        tail_mass=np.zeros(3, np.float32), tail_count=np.zeros(3, np.int32), tail_ids=np.zeros(0, np.int32)
    )
    entries = entries_of(targets, tau=None, temperature=2.0)
    first = np.exp(-0.35) / (np.exp(-0.35) + np.exp(-0.70))
    np.testing.assert_allclose(entries.weights, [first, 1 - first, 1.0], rtol=1e-6)
