import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softshard.target.codec import (
    LOGPROB_GRID,
    MASS_GRID,
    decode_head,
    encode_head,
    head_weights,
    offsets_of,
    to_logprob_grid,
    to_mass_grid,
)
from softshard.target.entries import entries_of
from softshard.target.types import SequenceTargets

logprob = st.floats(min_value=-120, max_value=0, width=32)
ragged = st.lists(st.lists(logprob, max_size=12).map(lambda row: sorted(row, reverse=True)), max_size=20)


def arrays(rows):
    counts = np.array([len(row) for row in rows], dtype=np.int32)
    return np.array([value for row in rows for value in row], dtype=np.float32), counts


@given(ragged, st.sampled_from([0.005, 0.02, 0.1]))
def test_decoded_steps_are_the_rounded_log_probabilities(rows, step):
    logprobs, counts = arrays(rows)
    decoded = decode_head(encode_head(logprobs, counts, step=step), counts)
    assert decoded.tolist() == np.rint(logprobs.astype(np.float64) / -step).astype(int).tolist()


@given(ragged.filter(any), st.floats(0.0, 1.0))
def test_head_weights_sum_to_the_head_mass_whatever_the_rounding(rows, tail):
    logprobs, counts = arrays(rows)
    steps = decode_head(encode_head(logprobs, counts, step=0.02), counts)
    mass = np.full(len(rows), 1 - tail, dtype=np.float32)
    weights = head_weights(steps, counts, mass, step=0.02)
    for row, part in enumerate(np.split(weights, np.cumsum(counts)[:-1])):
        assert part.sum() == pytest.approx(float(mass[row]) if counts[row] else 0, abs=1e-6)


def test_a_worked_example():
    # Probabilities .5 and .25 in steps of .1: 6.93 -> 7 and 13.86 -> 14, stored as 7 and 7; then one of 1: 0.
    logprobs = np.log(np.array([0.5, 0.25, 1.0], dtype=np.float32))
    counts = np.array([2, 0, 1], dtype=np.int32)
    stored = encode_head(logprobs, counts, step=0.1)
    assert stored.tolist() == [7, 7, 0]
    assert decode_head(stored, counts).tolist() == [7, 14, 0]
    weights = head_weights(decode_head(stored, counts), counts, np.array([0.75, 0, 1], dtype=np.float32), step=0.1)
    first = 0.75 / (1 + np.exp(-0.7))
    np.testing.assert_allclose(weights, [first, 0.75 - first, 1.0])


def test_differences_cannot_overflow():
    counts = np.array([3], dtype=np.int32)
    stored = encode_head(np.array([0.0, -1e30, -np.inf], dtype=np.float32), counts, step=0.001)
    assert decode_head(stored, counts).tolist() == [0, 32767, 32767]


def test_unsorted_head_is_refused():
    with pytest.raises(ValueError, match="fall"):
        encode_head(np.array([-2.0, -1.0], dtype=np.float32), np.array([2], dtype=np.int32), step=0.02)


def test_offsets_are_running_sums():
    assert offsets_of(np.array([2, 0, 3], dtype=np.int32)).tolist() == [0, 2, 2, 5]


@given(st.floats(-50, 0, width=32), st.floats(0, 1, width=32))
def test_grids_are_off_by_at_most_half_a_step(logprob, mass):
    assert abs(float(to_logprob_grid(np.float32([logprob]))[0]) - logprob) <= LOGPROB_GRID / 2
    assert abs(float(to_mass_grid(np.float32([mass]))[0]) - mass) <= MASS_GRID / 2


def test_entries_are_head_then_tail_of_each_label():
    targets = SequenceTargets(
        label_logprob=np.zeros(3, np.float32),
        entropy=np.zeros(3, np.float32),
        tail_mass=np.array([0.25, 1.0, 0.0], np.float32),
        head_count=np.array([2, 0, 1], np.int32),
        tail_count=np.array([1, 2, 0], np.int32),
        head_ids=np.array([5, 6, 7], np.int32),
        head_logprobs=np.array([-0.70, -1.40, 0.0], np.float32),
        tail_ids=np.array([1, 2, 3], np.int32),
    )
    entries = entries_of(targets, step=0.02, tau=0.25)
    assert entries.ids.tolist() == [5, 6, 1, 2, 3, 7]
    assert entries.offsets.tolist() == [0, 3, 5, 6]
    first = 0.75 * np.exp(-0.70) / (np.exp(-0.70) + np.exp(-1.40))
    np.testing.assert_allclose(entries.weights, [first, 0.75 - first, 0.25, 0.25, 0.25, 1.0], rtol=1e-6)
