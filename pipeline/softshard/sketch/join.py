"""Concatenation of the targets of several groups of labels, draw by draw, and its inverse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.types import SequenceTargets

__all__ = ["concatenate", "split_rows"]


def concatenate(parts: Sequence[SequenceTargets]) -> SequenceTargets:
    """The targets of all parts in order; all have the same number of draws."""
    names = ("label_logprob", "entropy", "tail_mass", "head_count", "head_ids", "head_logprobs")
    draws = [[part.of_draw(draw) for part in parts] for draw in range(max(part.draws for part in parts))]
    return SequenceTargets(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
        tail_count=np.concatenate([part.tail_count for draw in draws for part in draw]),
        tail_ids=np.concatenate([part.tail_ids for draw in draws for part in draw]),
    )


def split_rows(targets: SequenceTargets, num_labels: Sequence[int]) -> list[SequenceTargets]:
    """The inverse of `concatenate`, given the number of labels of each piece."""
    labels = counts_to_offsets(np.array(num_labels, dtype=np.int32))
    heads = counts_to_offsets(targets.head_count)[labels]
    draws = [targets.of_draw(draw) for draw in range(targets.draws)]
    tails = [counts_to_offsets(draw.tail_count)[labels] for draw in draws]
    pieces = []
    for piece in range(len(num_labels)):
        rows, head = (slice(at[piece], at[piece + 1]) for at in (labels, heads))
        pieces.append(
            SequenceTargets(
                label_logprob=targets.label_logprob[rows],
                entropy=targets.entropy[rows],
                tail_mass=targets.tail_mass[rows],
                head_count=targets.head_count[rows],
                tail_count=np.concatenate([draw.tail_count[rows] for draw in draws]),
                head_ids=targets.head_ids[head],
                head_logprobs=targets.head_logprobs[head],
                tail_ids=np.concatenate(
                    [draw.tail_ids[at[piece] : at[piece + 1]] for draw, at in zip(draws, tails, strict=True)]
                ),
            )
        )
    return pieces
