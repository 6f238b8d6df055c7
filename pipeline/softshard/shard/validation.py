"""Checks decoded targets for values that no sketch can have.

A hash proves that bytes are those that were written; these checks prove that what was written is a sketch. All rows of
a batch are checked together, because a sequence has hundreds of labels and a label few entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softshard.shard.decode import Block
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import LOGPROB_GRID, counts_to_offsets, head_weights, mass_grid
from softshard.sketch.types import SequenceTargets

__all__ = ["find_impossible"]

_ROUNDING = 1e-5


def find_impossible(draws: Sequence[Block], *, sequence_ids: Sequence[str], metadata: PartMetadata) -> list[str]:
    """One line for each sequence with an impossible value, about the first one found.

    Args:
        draws: the same R rows, at least one, once with each draw of their tails.
        sequence_ids: [R]
        metadata: of their part.
    """
    found: dict[int, str] = {}
    first = draws[0]
    owner = np.repeat(np.arange(len(sequence_ids)), first.label_counts)

    def note(bad: NDArray[np.bool_], problem: str) -> None:
        for row in np.unique(owner[bad]).tolist():
            found.setdefault(row, problem)

    finite = np.isfinite(first.targets.label_logprob) & (first.targets.label_logprob <= 0)
    note(~finite, "a label has a log-probability that is above 0 or not finite")
    most = np.log(metadata.vocab_size) + LOGPROB_GRID
    possible = (first.targets.entropy >= 0) & (first.targets.entropy <= most)
    note(~possible, "an entropy is impossible for the vocabulary")
    for block in draws:
        twice, wrong = _check_entries(block.targets, metadata)
        note(twice, "a label has a token twice")
        note(wrong, "the mass of a label is not 1")
    return [f"sequence {sequence_ids[row]}: {found[row]}" for row in sorted(found)]


def _check_entries(targets: SequenceTargets, metadata: PartMetadata) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[P] labels that have a token twice, and [P] labels whose entries, as a reader weighs them, do not sum to 1."""
    tau, outside, counts = metadata.tau, targets.tail_mass.astype(np.float64), targets.tail_count
    labels = np.arange(targets.num_labels, dtype=np.int64) << 32
    # Comparing sorted neighbours takes a tenth of the time of a hash table, for a hundred thousand entries.
    heads = np.repeat(labels, targets.head_count) | targets.head_ids
    places = np.sort(np.concatenate([heads, np.repeat(labels, counts) | targets.tail_ids]))
    twice = np.zeros(targets.num_labels, dtype=np.bool_)
    twice[places[1:][places[1:] == places[:-1]] >> 32] = True
    weights = head_weights(targets.head_logprobs, targets.head_count, 1 - targets.tail_mass)
    filled = targets.head_count > 0
    mass = np.zeros(targets.num_labels)
    if filled.any():
        mass[filled] = np.add.reduceat(weights, counts_to_offsets(targets.head_count)[:-1][filled])
    right = (outside >= 0) & (outside <= 1) & (filled | (outside == 1))
    right &= np.abs(mass - np.where(filled, 1 - outside, 0.0)) <= _ROUNDING
    if tau is None:
        right &= counts == 0
    else:
        right &= np.abs(counts * tau - outside) <= tau + mass_grid(tau)
    return twice, ~right
