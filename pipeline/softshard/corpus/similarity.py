"""Finds texts that share most of their runs of five words, by MinHash (Broder, 1997) and locality-sensitive hashing.

A text becomes 25 keys. Two texts have a key in common with a probability that depends on the share of their runs that
both have: 2% where that is half, 51% at 0.7, 94% at 0.8, 99.99% at 0.9. Words are runs of letters and digits, whatever
their case. Keys depend on the text alone, so the same texts in the same order give the same result everywhere.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUM_KEYS", "similarity_keys"]

NUM_KEYS = 25
_MINIMA_PER_KEY = 10
_WORDS_PER_RUN = 5
_RUNS_AT_ONCE = 512
_NUM_MINIMA = NUM_KEYS * _MINIMA_PER_KEY
_CONSTANTS = np.frombuffer(hashlib.shake_256(b"softshard: minima").digest(8 * _NUM_MINIMA), dtype="<u4")
_FACTORS, _TERMS = _CONSTANTS[:_NUM_MINIMA] | np.uint32(1), _CONSTANTS[_NUM_MINIMA:]
"""Each pair makes one order of all 32-bit numbers: h * factor + term, modulo 2^32."""
_POSITIONS = tuple(pow(0x9E3779B97F4A7C15, place, 2**64) for place in range(_WORDS_PER_RUN))


def similarity_keys(pieces: Iterable[list[str]]) -> list[int]:
    """Keys of a text, given by its words in pieces; none for a text without words.

    A text of fewer than five words is one run.
    """
    minima = np.full(_NUM_MINIMA, 2**32 - 1, dtype=np.uint32)
    words = np.zeros(0, dtype=np.uint64)
    is_begun = False
    for piece in pieces:
        words = np.concatenate([words, np.array([zlib.crc32(word.encode()) for word in piece], dtype=np.uint64)])
        if len(words) >= _WORDS_PER_RUN:
            _take_minima(minima, _hash_runs(words))
            words = words[1 - _WORDS_PER_RUN :]
            is_begun = True
    if not is_begun and not len(words):
        return []
    if not is_begun:
        _take_minima(minima, _hash_runs(np.resize(words, _WORDS_PER_RUN)))
    bands = minima.astype("<u4").reshape(NUM_KEYS, _MINIMA_PER_KEY)
    return [_band_key(number, band) for number, band in enumerate(bands)]


def _hash_runs(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """[N - 4] a number for each run of five words."""
    num_runs = len(words) - _WORDS_PER_RUN + 1
    runs = np.zeros(num_runs, dtype=np.uint64)
    for place, factor in enumerate(_POSITIONS):
        runs += words[place : place + num_runs] * np.uint64(factor)
    # The last steps of splitmix64 (Steele, Lea, Flood, 2014): runs that differ little get numbers that differ much.
    runs = (runs ^ (runs >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    runs = (runs ^ (runs >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (runs >> np.uint64(32)).astype(np.uint32)


def _take_minima(minima: NDArray[np.uint32], runs: NDArray[np.uint32]) -> None:
    for start in range(0, len(runs), _RUNS_AT_ONCE):
        ordered = runs[start : start + _RUNS_AT_ONCE, None] * _FACTORS + _TERMS
        np.minimum(minima, ordered.min(axis=0), out=minima)


def _band_key(number: int, band: NDArray[np.uint32]) -> int:
    digest = hashlib.blake2b(band.tobytes(), digest_size=8, salt=number.to_bytes(16, "little"))
    return int.from_bytes(digest.digest(), "little")
