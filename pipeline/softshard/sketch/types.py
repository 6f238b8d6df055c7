"""The two records that go through the whole package: a sequence of tokens, and the targets of its labels.

A sequence has L tokens. P of them are labels, the tokens whose targets are stored; the others are context. The target
of a label is the distribution at the position before it, so the first token can never be a label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["SequenceTargets", "TokenSequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One window of one document, and which of its tokens are labels.

    Raises:
        ValueError: no token is a label, or a span is empty, holds token 0, overlaps the one before or ends beyond L.
    """

    sequence_id: str
    """blake2b-128, in hex, of (document digest, tokenizer fingerprint, start, context, overlap)."""
    document_id: str
    """blake2b-128, in hex, of the document's normalised text."""
    source: str
    style: str
    group: str
    start: int
    """Place of token_ids[0] in the document's tokens."""
    token_ids: NDArray[np.int32]
    """[L]"""
    label_spans: tuple[tuple[int, int], ...]
    """Runs of labels in token_ids as (start, stop), in rising order and without overlap. A window of plain text has one
    run, which ends at L; in a conversation each answer is a run."""

    def __post_init__(self) -> None:
        bounds = [1, *(bound for span in self.label_spans for bound in span), len(self.token_ids)]
        empty = any(start == stop for start, stop in self.label_spans)
        if not self.label_spans or empty or bounds != sorted(bounds):
            raise ValueError(
                f"sequence {self.sequence_id}: label_spans is {self.label_spans} for {len(self.token_ids)} tokens; it"
                " must hold at least one span, none empty, in rising order without overlap, from token 1 on"
            )

    @property
    def num_labels(self) -> int:
        """P, the number of labels."""
        return sum(stop - start for start, stop in self.label_spans)

    @property
    def label_indices(self) -> NDArray[np.int64]:
        """[P] indices of the labels in token_ids, rising."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.label_spans])

    @property
    def positions(self) -> NDArray[np.int64]:
        """[P] indices of the tokens before the labels: the logits there are compared with the targets."""
        return self.label_indices - 1

    @property
    def labels(self) -> NDArray[np.int32]:
        """[P] ids of the labels."""
        return self.token_ids[self.label_indices]


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
