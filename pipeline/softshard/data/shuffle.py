"""The order of training data: seeded permutations, a bounded shuffle, and batches of a token budget.

In: a digest of the data, a seed, an epoch, the lengths of the sequences. Out: row numbers in the order of training, and
where its batches begin. Everything is a function of the arguments alone; batches are sharded over ranks afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["batch_bounds", "through_buffer"]


def through_buffer(rows: NDArray[np.int64], *, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`rows` in the order in which they leave a shuffle buffer of `size` rows.

    Once full, the buffer emits a random row for each row that enters, so output k is among the first k + size of
    `rows`: a reader of the rows in their original order holds at most `size` of them. At the end the buffer is emptied
    in random order.
    """
    buffer = rows[:size].tolist()
    late = rows[size:].tolist()
    shuffled = []
    for slot, row in zip(generator.integers(size, size=len(late)).tolist(), late, strict=True):
        shuffled.append(buffer[slot])
        buffer[slot] = row
    last = generator.permutation(np.array(buffer, dtype=np.int64))
    return np.concatenate([np.array(shuffled, dtype=np.int64), last])


def batch_bounds(lengths: NDArray[np.int64], *, batch_tokens: int, packing: bool = False) -> NDArray[np.int64]:
    """[num_batches + 1] bounds of batches of consecutive sequences: batch i is bounds[i]:bounds[i + 1].

    A batch is extended while its size stays at most `batch_tokens`: the sum of the lengths if packed, else the number
    of sequences times the longest of them. A longer sequence is a batch of its own.
    """
    bounds, start, longest, total = [0], 0, 0, 0
    for index, length in enumerate(lengths.tolist()):
        longest, total = max(longest, length), total + length
        size = total if packing else (index + 1 - start) * longest
        if index > start and size > batch_tokens:
            bounds.append(index)
            start, longest, total = index, length, length
    if len(lengths):
        bounds.append(len(lengths))
    return np.array(bounds, dtype=np.int64)
