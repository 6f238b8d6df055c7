import numpy as np
import pytest

from softshard.sketch.philox import label_uniforms, philox4x32

# Known answers that the authors of Philox publish with Random123 (philox4x32, 10 rounds): counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_words_are_the_published_ones(counter, key, expected):
    assert philox4x32(np.array([counter], dtype=np.uint32), key)[0].tolist() == expected


def test_a_label_keeps_its_number_whatever_is_asked_for_beside_it():
    whole = label_uniforms(np.arange(1, 101), seed=3, sequence_id="ab")
    piece = label_uniforms(np.array([2, *range(41, 48), 99]), seed=3, sequence_id="ab")
    np.testing.assert_array_equal(piece, whole[[1, *range(40, 47), 98]])


@pytest.mark.parametrize("change", [{"seed": 4}, {"sequence_id": "ac"}, {"draw": 1}])
def test_seed_sequence_and_draw_each_change_the_numbers(change):
    asked, labels = {"seed": 3, "sequence_id": "ab"}, np.arange(1, 51)
    assert not np.any(label_uniforms(labels, **asked) == label_uniforms(labels, **{**asked, **change}))


def test_numbers_fill_the_unit_interval_evenly():
    numbers = label_uniforms(np.arange(1, 64_001), seed=0, sequence_id="x")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 130  # 63 degrees of freedom: the chance of more is 1e-6
