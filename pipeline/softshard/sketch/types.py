"""The two records that everything passes on: a sequence of tokens, and its targets.

Indices: label j of a sequence is `token_ids[first_label + j]`, and its target is the distribution at the position
before it, `first_label + j - 1`. L tokens have P = L - first_label labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["SequenceTargets", "TokenSequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One window of one document."""

    sequence_id: str
    """blake2b-128, in hex, of (document digest, tokenizer fingerprint, start, context, overlap)."""
    document_id: str
    """blake2b-128, in hex, of the document's normalised text."""
    source: str
    style: str
    group: str
    start: int
    """Place of token_ids[0] in the document's tokens."""
    first_label: int
    """Index in token_ids of the first label, at least 1."""
    token_ids: NDArray[np.int32]
    """[L]"""

    @property
    def num_labels(self) -> int:
        """P, the number of labels."""
        return len(self.token_ids) - self.first_label

    @property
    def labels(self) -> NDArray[np.int32]:
        """[P] ids of the labels."""
        return self.token_ids[self.first_label :]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTargets:
    """Sketches of the targets of P labels. Entries of label j are the next head_count[j] and tail_count[j] ones."""

    label_logprob: NDArray[np.float32]
    """[P] log-probability of the label under the target, in nats; -1,000 where it is lower or impossible."""
    entropy: NDArray[np.float32]
    """[P] entropy of the target, in nats."""
    tail_mass: NDArray[np.float32]
    """[P] mass of the tokens outside the head."""
    head_count: NDArray[np.int32]
    """[P]"""
    tail_count: NDArray[np.int32]
    """[draws * P] counts of all labels in the first draw, then of all labels in the second."""
    head_ids: NDArray[np.int32]
    """[H] by falling probability within a label; equal ones by rising id."""
    head_logprobs: NDArray[np.float32]
    """[H] in nats. Only differences within a label count: the head as a whole weighs 1 - tail_mass."""
    tail_ids: NDArray[np.int32]
    """[T] in the order of tail_count, each another token of its label; each weighs tau."""

    @property
    def num_labels(self) -> int:
        """P."""
        return len(self.entropy)

    @property
    def draws(self) -> int:
        """Independent tails that each label has; 1 where there is no label."""
        return len(self.tail_count) // self.num_labels if self.num_labels else 1

    def of_draw(self, draw: int) -> SequenceTargets:
        """The same heads with one draw's tails alone; `draw` counts from 0 and starts again after the last."""
        if self.draws == 1:
            return self
        draw %= self.draws
        counts = self.tail_count.reshape(self.draws, self.num_labels)
        start = int(counts[:draw].sum())
        tails = self.tail_ids[start : start + int(counts[draw].sum())]
        return replace(self, tail_count=counts[draw], tail_ids=tails)
