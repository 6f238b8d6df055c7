import math

import pytest

from softshard.evaluate.text_metrics import (
    distinct_n,
    mattr,
    rank_frequency,
    sentence_length_w1,
    sentence_lengths,
    split_words,
    token_l2,
)


def test_words_are_runs_of_letters_with_inner_apostrophes_in_lower_case():
    assert split_words("Don't – the cat’s 3 mice; ÉTÉ! 'quoted' x2y") == [
        "don't",
        "the",
        "cat's",
        "mice",
        "été",
        "quoted",
        "x",
        "y",
    ]


def test_mattr_is_the_mean_over_all_windows():
    # windows of 3: (a b a) 2, (b a b) 2, (a b c) 3 different words
    assert mattr(["a", "b", "a", "b", "c"], window=3) == pytest.approx((2 + 2 + 3) / 9)


def test_mattr_agrees_with_every_window_counted_afresh():
    words = [str(n * n % 17) for n in range(200)]
    windows = [words[at : at + 50] for at in range(151)]
    expected = sum(len(set(window)) / 50 for window in windows) / 151
    assert mattr(words, window=50) == pytest.approx(expected)


def test_a_text_shorter_than_the_window_is_one_window():
    assert mattr(["a", "b", "a"], window=50) == pytest.approx(2 / 3)
    assert mattr([], window=50) == 0


def test_distinct_counts_no_ngram_across_two_texts():
    # pairs: ab, ba, ab | ab: two different of four; "a b | a b" has no pair "b a" between the texts
    assert distinct_n([list("abab"), list("ab")], n=2) == pytest.approx(2 / 4)
    assert distinct_n([list("ab"), list("ab")], n=2) == pytest.approx(1 / 2)
    assert distinct_n([list("ab")], n=3) == 0


def test_sentences_end_at_marks_and_at_line_breaks():
    text = 'He paid 3.50 for it. "Why?" she said... No answer\nNext line! …and (so on.) End'
    assert sentence_lengths(text) == [4, 1, 2, 2, 2, 3, 1]


def test_a_mark_within_a_word_ends_no_sentence_and_wordless_ones_do_not_count():
    assert sentence_lengths("see example.com now. ... 42. !") == [4]
    assert sentence_lengths("") == []


def test_sentence_length_distance_is_the_mean_shift_of_matched_quantiles():
    # sorted and matched one to one: |1-2| + |3-2| + |8-11| over 3
    assert sentence_length_w1([8, 1, 3], [2, 11, 2]) == pytest.approx(5 / 3)
    assert sentence_length_w1([4, 4], [4]) == 0


def test_no_sentence_counts_as_one_of_length_zero():
    assert sentence_length_w1([], [3, 5]) == pytest.approx(4)


def test_token_distance_is_of_relative_frequencies():
    # (2/3, 1/3, 0) against (0, 1, 0)
    assert token_l2([[0, 0], [1]], [[1]], vocab_size=3) == pytest.approx(math.sqrt(4 / 9 + 4 / 9))
    assert token_l2([[0, 1]], [[1, 0], [0, 1]], vocab_size=3) == 0
    assert token_l2([], [[2]], vocab_size=3) == pytest.approx(1)


def test_rank_frequencies_fall_and_sum_to_one():
    assert rank_frequency(["b", "a", "b", "c", "b", "a"]) == pytest.approx([3 / 6, 2 / 6, 1 / 6])
