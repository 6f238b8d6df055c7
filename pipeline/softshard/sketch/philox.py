"""One uniform random number for each label and draw, the same in every batch, on every worker and in every retry.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; 2011). The key is a hash of
(seed, sequence id), the counter is (index of the label in the sequence, draw).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.sketch.types import TokenSequence

__all__ = ["draw_uniforms", "label_uniforms", "philox4x32", "tail_uniforms"]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """[n, 4] random words for [n, 4] counters under one key of two words."""
    c0, c1, c2, c3 = (counter[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (second >> _HALF) ^ c1 ^ np.uint64(k0), (first >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def label_uniforms(
    label_indices: NDArray[np.integer[Any]], *, seed: int, sequence_id: str, draw: int = 0
) -> NDArray[np.float64]:
    """[P] numbers in [0, 1) of 53 bits, for the labels of a sequence at these indices [P]."""
    name = f"softshard.sketch\0{seed}\0{sequence_id}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=8).digest(), dtype="<u4")
    counter = np.zeros((len(label_indices), 4), dtype=np.uint32)
    counter[:, 0] = label_indices
    counter[:, 1] = draw
    words = philox4x32(counter, (int(key[0]), int(key[1]))).astype(np.uint64)
    high, low = words[:, 0] >> np.uint64(5), words[:, 1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * np.uint64(1 << 26) + low).astype(np.float64) * 2.0**-53
    return numbers


def draw_uniforms(
    label_indices: NDArray[np.integer[Any]], *, seed: int, sequence_id: str, draws: int
) -> NDArray[np.float64]:
    """[draws, P] numbers of `label_uniforms` for each independent tail."""
    return np.stack(
        [label_uniforms(label_indices, seed=seed, sequence_id=sequence_id, draw=draw) for draw in range(draws)]
    )


def tail_uniforms(sequences: Sequence[TokenSequence], *, seed: int, draws: int) -> NDArray[np.float64]:
    """[draws, P] numbers of the labels of all sequences, one after the other, for each independent tail."""
    numbers = [
        draw_uniforms(sequence.label_indices, seed=seed, sequence_id=sequence.sequence_id, draws=draws)
        for sequence in sequences
    ]
    return np.concatenate(numbers, axis=1)
