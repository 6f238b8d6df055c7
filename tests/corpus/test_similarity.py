"""Texts that share most of their runs of five words share a key; others do not."""

import random
import tracemalloc

import pytest

from softshard.corpus.similarity import NUM_KEYS, similarity_keys

NUM_WORDS = 200


def pair(shared, *, number):
    """Two texts that have this share of all their runs of five words in common: those of a common beginning."""
    draw = random.Random(number)
    words = [f"{draw.randrange(10**9)}" for _ in range(2 * NUM_WORDS)]
    runs = NUM_WORDS - 4
    common = round(2 * runs * shared / (1 + shared)) + 4
    return words[:NUM_WORDS], words[:common] + words[NUM_WORDS : 2 * NUM_WORDS - common]


def runs_of(words):
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize(("shared", "least", "most"), [(0.3, 0, 3), (0.5, 0, 14), (0.7, 72, 132), (0.8, 172, 200)])
def test_pairs_are_found_as_often_as_the_share_of_their_runs_makes_likely(shared, least, most):
    """Of 200 pairs, 1 - (1 - share^10)^25 of them are expected, within four standard deviations."""
    found = 0
    for number in range(200):
        first, second = pair(shared, number=number)
        both, all_ = runs_of(first) & runs_of(second), runs_of(first) | runs_of(second)
        assert abs(len(both) / len(all_) - shared) < 0.01
        found += not set(similarity_keys([first])).isdisjoint(similarity_keys([second]))
    assert least <= found <= most


def test_keys_do_not_depend_on_how_a_text_is_divided():
    words = pair(0.5, number=0)[0]
    whole = similarity_keys([words])
    assert len(whole) == NUM_KEYS
    for size in (1, 3, 4, 5, 7, 150):
        assert similarity_keys([words[i : i + size] for i in range(0, len(words), size)]) == whole
    assert similarity_keys([words[:100], [], words[100:]]) == whole


def test_short_texts_are_compared_as_a_whole_and_texts_without_words_with_nothing():
    assert similarity_keys([["one", "two"]]) == similarity_keys([["one"], ["two"]])
    assert set(similarity_keys([["one", "two"]])).isdisjoint(similarity_keys([["two", "one"]]))
    assert similarity_keys([]) == similarity_keys([[], []]) == []


def test_memory_does_not_grow_with_the_text():
    words = [f"word{i}" for i in range(5000)]
    similarity_keys([words])
    tracemalloc.start()
    similarity_keys(words for _ in range(20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20
