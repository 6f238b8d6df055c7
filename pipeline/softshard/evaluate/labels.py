"""Scores of a model at each label of some sequences: negative log-likelihood, cross-entropy, entropy, confidence.

Reads a causal language model and sequences, with or without the entries of their targets, and yields arrays with one
number per label, sequence by sequence. A label is predicted by the logits at the position before it. Logits beyond the
vocabulary are dropped before the softmax, which is taken in float32. Sequences are read 1,024 at a time and batched by
length, and logits exist for 256 positions at a time, so memory does not grow with the input.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.errors import LogitsInvalid
from softshard.models import check_vocabulary
from softshard.models.decoder import Decoder, batches_by_length
from softshard.sketch.entries import Entries
from softshard.sketch.types import TokenSequence

__all__ = ["LabelScores", "ScoredSequence", "score_labels"]

ScoredSequence = tuple[TokenSequence, Entries | None]
"""A sequence, and the entries of its targets where a cross-entropy against them is wanted."""

_ROWS_OF_LOGITS = 256
_SEQUENCES_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """Scores of a model q at P labels; every array is [P]."""

    nll: NDArray[np.float64]
    """-log q(label)."""
    cross_entropy: NDArray[np.float64]
    """-sum_i w_i log q_i over the label's entries; 0 where none were given."""
    entropy: NDArray[np.float64]
    """-sum_i q_i log q_i."""
    confidence: NDArray[np.float64]
    """Probability of the most likely token."""
    correct: NDArray[np.bool_]
    """Whether the most likely token is the label; of equal ones the lowest id counts."""

    def rows(self, rows: slice) -> LabelScores:
        """Scores of some of the labels."""
        return LabelScores(**{name: getattr(self, name)[rows] for name in self.__slots__})

    @classmethod
    def joined(cls, pieces: list[LabelScores]) -> LabelScores:
        """Scores of several pieces, one after another."""
        return cls(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in cls.__slots__})


def score_labels(
    model: Any, sequences: Iterable[ScoredSequence], *, num_valid: int, batch_tokens: int
) -> Iterator[tuple[TokenSequence, LabelScores]]:
    """Every sequence once, with its scores, in an order that depends only on the lengths.

    `num_valid` is the vocabulary size, `batch_tokens` the budget of a batch with its padding.

    Raises:
        LogitsInvalid: the model gave NaN or infinity, or a label no probability at all.
        ModelInvalid: the model's logits are not its output layer's, as `Decoder.of` checks.
        VocabularyMismatch: it gives fewer than `num_valid` logits.
    """
    decoder = Decoder.of(model)
    name = str(getattr(model.config, "name_or_path", "") or "the model")
    check_vocabulary(model=name, model_size=decoder.output_size, data="the hold-out", data_size=num_valid)
    stream = iter(sequences)
    while window := list(itertools.islice(stream, _SEQUENCES_AT_A_TIME)):
        for indices in batches_by_length([sequence for sequence, _ in window], batch_tokens=batch_tokens):
            batch = [window[index] for index in indices]
            scores = _score_batch(decoder, batch, num_valid)
            start = 0
            for sequence, _ in batch:
                end = start + sequence.num_labels
                yield sequence, scores.rows(slice(start, end))
                start = end


@torch.inference_mode()
def _score_batch(decoder: Decoder, batch: list[ScoredSequence], num_valid: int) -> LabelScores:
    sequences = [sequence for sequence, _ in batch]
    states = decoder.hidden_states(sequences)
    labels = np.concatenate([sequence.labels for sequence in sequences]).astype(np.int64)
    entries = _joined(batch)
    pieces = []
    for start in range(0, len(labels), _ROWS_OF_LOGITS):
        rows = slice(start, min(start + _ROWS_OF_LOGITS, len(labels)))
        logits = decoder.logits(states[rows])[:, :num_valid].float()
        pieces.append(_score_rows(logits, labels[rows], _entries_at(entries, rows)))
    scores = LabelScores.joined(pieces)
    _check_finite(scores, sequences)
    return scores


def _joined(batch: list[ScoredSequence]) -> Entries | None:
    """Entries of all labels of a batch, in the order of its sequences."""
    each = [entries for _, entries in batch if entries is not None]
    if not each:
        return None
    counts = np.concatenate([np.diff(entries.offsets) for entries in each])
    return Entries(
        ids=np.concatenate([entries.ids for entries in each]),
        weights=np.concatenate([entries.weights for entries in each]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )


def _entries_at(entries: Entries | None, rows: slice) -> Entries | None:
    if entries is None:
        return None
    offsets = entries.offsets[rows.start : rows.stop + 1]
    inside = slice(int(offsets[0]), int(offsets[-1]))
    return Entries(ids=entries.ids[inside], weights=entries.weights[inside], offsets=offsets - offsets[0])


def _score_rows(logits: Tensor, labels: NDArray[np.int64], entries: Entries | None) -> LabelScores:
    """Scores of a few positions from their logits [rows, num_valid]."""
    logq = torch.log_softmax(logits, dim=1)
    nll = -logq.gather(1, torch.from_numpy(labels).to(logq.device)[:, None])[:, 0]
    probabilities = logq.exp()
    confidence, top = probabilities.max(dim=1)
    return LabelScores(
        nll=_float64(nll),
        cross_entropy=np.zeros(len(labels)) if entries is None else _cross_entropy(logq, entries),
        entropy=_float64(torch.special.entr(probabilities).sum(dim=1)),
        confidence=_float64(confidence),
        correct=top.cpu().numpy() == labels,
    )


def _cross_entropy(logq: Tensor, entries: Entries) -> NDArray[np.float64]:
    rows = np.repeat(np.arange(len(logq)), np.diff(entries.offsets))
    ids = torch.from_numpy(entries.ids.astype(np.int64))
    terms = -_float64(logq[torch.from_numpy(rows).to(logq.device), ids.to(logq.device)])
    sums = np.zeros(len(logq))
    np.add.at(sums, rows, entries.weights * terms)
    return sums


def _float64(values: Tensor) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = values.cpu().numpy().astype(np.float64)
    return numbers


def _check_finite(scores: LabelScores, sequences: list[TokenSequence]) -> None:
    bad = np.flatnonzero(~np.isfinite(scores.nll + scores.cross_entropy))
    if len(bad):
        places = [(sequence, position) for sequence in sequences for position in sequence.positions.tolist()]
        sequence, position = places[bad[0]]
        raise LogitsInvalid(
            sequence_id=sequence.sequence_id,
            position=position,
            value=float(-scores.nll[bad[0]]),
            model="the evaluated model",
            setting="train.dtype",
        )
