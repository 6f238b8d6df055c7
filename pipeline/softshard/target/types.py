"""The two records that everything passes on: a sequence of tokens, and its targets.

Indices: label j of a sequence is `token_ids[first_label + j]`, and its target is the distribution at the position
before it, `first_label + j - 1`. L tokens have P = L - first_label labels.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Sketches of one sequence's targets. Entries of label j are the next head_count[j] and tail_count[j] ones."""

    label_logprob: NDArray[np.float32]
    """[P] log-probability of the label under the target, in nats."""
    entropy: NDArray[np.float32]
    """[P] entropy of the target, in nats."""
    tail_mass: NDArray[np.float32]
    """[P] exact mass of the tokens outside the head."""
    head_count: NDArray[np.int32]
    """[P]"""
    tail_count: NDArray[np.int32]
    """[P]"""
    head_ids: NDArray[np.int32]
    """[H] by falling probability within a label; equal ones by rising id."""
    head_logprobs: NDArray[np.float32]
    """[H] in nats, relative to the whole distribution."""
    tail_ids: NDArray[np.int32]
    """[T] ascending within a label; each weighs tau."""
