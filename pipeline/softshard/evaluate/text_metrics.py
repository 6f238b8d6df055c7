"""Statistics of texts, and distances between two sets of texts.

In: texts, lists of words, or lists of token ids. Out: plain numbers. A word is a run of letters, including apostrophes
between letters, in lower case; digits and punctuation are not words. An empty input gives 0, never an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "distinct_n",
    "mattr",
    "rank_frequency",
    "sentence_length_w1",
    "sentence_lengths",
    "split_words",
    "token_l2",
]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|\n+")


def split_words(text: str) -> list[str]:
    """Words of a text in lower case, curly apostrophes made straight."""
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def mattr(tokens: Sequence[Hashable], *, window: int = 50) -> float:
    """Moving-average type-token ratio (Covington and McFall, 2010), between 0 and 1.

    The mean over all windows of `window` tokens of distinct tokens / tokens; a shorter text is one window.
    """
    if not tokens:
        return 0.0
    width = min(window, len(tokens))
    counts = Counter(tokens[:width])
    total = len(counts)
    for leaving, entering in zip(tokens, tokens[width:], strict=False):
        counts[entering] += 1
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        total += len(counts)
    return total / (width * (len(tokens) - width + 1))


def distinct_n(texts: Iterable[Sequence[Hashable]], *, n: int) -> float:
    """Distinct n-grams / n-grams over all texts (Li et al., 2016); no n-gram spans two texts.

    It falls as the amount of text grows, so compare only texts of about equal length.
    """
    grams = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def sentence_lengths(text: str) -> list[int]:
    """Number of words of each sentence; a sentence without words does not count.

    A sentence ends at . ! ? or … (closing quotes and brackets included) before white space or the end, and at a line
    break. An abbreviation before a space also ends one; the rule is the same for all texts that are compared.
    """
    lengths = (len(split_words(piece)) for piece in _SENTENCE_END.split(text))
    return [length for length in lengths if length]


def sentence_length_w1(samples: Sequence[int], human: Sequence[int]) -> float:
    """Wasserstein-1 distance, in words, of two sets of sentence lengths; an empty set is one sentence of length 0.

    The area between their cumulative distributions.
    """
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(samples or [0], human or [0]))


def token_l2(samples: Iterable[Sequence[int]], human: Iterable[Sequence[int]], *, vocab_size: int) -> float:
    """Euclidean distance of the relative frequencies of all tokens, between 0 and sqrt(2)."""
    return float(np.linalg.norm(_frequencies(samples, vocab_size) - _frequencies(human, vocab_size)))


def _frequencies(texts: Iterable[Sequence[int]], vocab_size: int) -> NDArray[np.float64]:
    counts = np.zeros(vocab_size)
    for ids in texts:
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocab_size)
    frequencies: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return frequencies


def rank_frequency(tokens: Iterable[Hashable]) -> list[float]:
    """Relative frequencies of the distinct tokens, most frequent first."""
    counts = sorted(Counter(tokens).values(), reverse=True)
    total = sum(counts)
    return [count / total for count in counts]
