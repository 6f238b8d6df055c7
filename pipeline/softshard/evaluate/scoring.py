"""A model on held-out writing: the probability of the tokens that people wrote, and the distance from the targets.

In: a causal language model and held-out sequences, with or without their targets. Out: means over all labels, the
reliability of the most likely token, and sums per document, from which standard errors are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.errors import HoldoutEmpty
from softshard.evaluate.labels import LabelScores, ScoredSequence, score_labels
from softshard.evaluate.text import text_after
from softshard.models import Tokenizer
from softshard.shard.read import Row
from softshard.shard.schema import PartMetadata
from softshard.sketch.entries import entries_of
from softshard.sketch.types import TokenSequence

__all__ = ["DocumentSum", "HoldoutScores", "ReliabilityBin", "retention_nll", "score_holdout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Labels whose most likely token has a probability in (lower, upper]."""

    lower: float
    upper: float
    num_labels: int
    confidence: float
    """Mean probability of the most likely token; 0 in an empty bin."""
    accuracy: float
    """Share of the labels where it is the human token; 0 in an empty bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSum:
    """One document's labels."""

    nll_nats: float
    """Sum of -log q(label)."""
    num_labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldoutScores:
    """A model q on the hold-out. Means are over labels, the end-of-text labels included."""

    human_nll_nats: float
    """Mean of -log q(label)."""
    bits_per_byte: float
    """Sum of -log2 q(label) over the UTF-8 bytes of the labels' text. An end-of-text label counts in the sum and has no
    bytes. Tokens that are only context (a document's first token, BOS, the overlap of windows) count in neither. The
    bytes of a character that is split between windows count in the window that completes it."""
    kl_to_teacher_nats: float | None
    """Mean of KL(target || q) = -sum_i w_i log q_i - entropy, with the stored weights w and the stored entropy of the
    whole target. The weights are the target (`full`) or have it as their expectation (`threshold`), so this is
    unbiased up to the grids of the stored values; as an estimate it can fall below 0. None where the stored form leaves
    out the tail (`topk`, `nucleus`): the contribution of the missing tokens is unknown, and the KL of a renormalised
    head is the distance from another distribution."""
    teacher_nll_nats: float
    """Mean of the stored -log p(label): the teacher on the same labels, at the temperature of capture."""
    ece: float
    """Expected calibration error (Naeini et al., 2015): sum over bins of share * |accuracy - confidence|."""
    accuracy: float
    """Share of the labels that are the model's most likely token."""
    mean_entropy_nats: float
    """Mean entropy of q."""
    num_labels: int
    num_sequences: int
    num_bytes: int
    """The bytes of `bits_per_byte`."""
    reliability: tuple[ReliabilityBin, ...]
    """Bins of equal width between 0 and 1."""
    documents: dict[str, DocumentSum]
    """By document id. Standard errors treat a document as one observation."""


def score_holdout(
    model: Any,
    rows: Iterable[tuple[Row, PartMetadata]],
    *,
    tokenizer: Tokenizer,
    num_valid: int,
    batch_tokens: int,
    num_bins: int,
    on_progress: Callable[[float], None],
) -> HoldoutScores:
    """Score a model, with an adapter or without, that is in evaluation mode.

    `num_valid` is the vocabulary size of the targets, `batch_tokens` the budget of a batch including padding, and
    `on_progress` is called with the number of labels scored so far.

    Raises:
        HoldoutEmpty: `rows` is empty.
        LogitsInvalid, ModelInvalid, VocabularyMismatch: see `score_labels`.
    """
    sums = _Sums(num_bins=num_bins)
    sequences = sums.read(rows, tokenizer)
    for sequence, scores in score_labels(model, sequences, num_valid=num_valid, batch_tokens=batch_tokens):
        sums.add(sequence, scores)
        on_progress(sums.num_labels)
    if not sums.num_labels:
        raise HoldoutEmpty(
            data="the test split of the targets",
            problem="no sequence is held out, so there is nothing to evaluate on",
            remedy="add documents or raise `corpus.holdout_fraction`",
        )
    return sums.means()


def retention_nll(
    model: Any,
    sequences: Iterable[TokenSequence],
    *,
    num_valid: int,
    batch_tokens: int,
    on_progress: Callable[[float], None],
) -> float:
    """Mean of -log q(label), in nats, on held-out writing of another kind; scored as `score_holdout` does.

    Raises:
        HoldoutEmpty: `sequences` is empty.
        LogitsInvalid, ModelInvalid, VocabularyMismatch: see `score_labels`.
    """
    nats, done = 0.0, 0
    for sequence, scores in score_labels(
        model,
        ((sequence, None) for sequence in sequences),
        num_valid=num_valid,
        batch_tokens=batch_tokens,
    ):
        nats += float(scores.nll.sum())
        done += sequence.num_labels
        on_progress(done)
    if not done:
        raise HoldoutEmpty(
            data="the retention sources",
            problem="no sequence is held out, so retention cannot be measured",
            remedy="add documents to `train.retention.sources`",
        )
    return nats / done


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Running sums over the hold-out."""

    num_bins: int
    num_labels: int = 0
    num_sequences: int = 0
    num_bytes: int = 0
    cross_entropy: float = 0.0
    entropy: float = 0.0
    target_entropy: float = 0.0
    teacher_nll: float = 0.0
    unbiased: bool = True
    """Whether all targets so far cover the whole distribution, exactly or in expectation."""
    documents: dict[str, DocumentSum] = field(default_factory=dict)
    bins: NDArray[np.float64] = field(init=False)
    """[num_bins, 3] labels, sum of confidence, labels that are correct."""

    def __post_init__(self) -> None:
        self.bins = np.zeros((self.num_bins, 3))

    def read(self, rows: Iterable[tuple[Row, PartMetadata]], tokenizer: Tokenizer) -> Iterator[ScoredSequence]:
        """Yield what `score_labels` takes, and add what depends only on the data to the sums."""
        for (sequence, targets), metadata in rows:
            ids = sequence.token_ids.tolist()
            texts = [text_after(tokenizer, ids[:stop], start=start) for start, stop in sequence.label_spans]
            self.num_bytes += sum(len(text.encode()) for text in texts)
            self.num_sequences += 1
            self.target_entropy += float(targets.entropy.sum(dtype=np.float64))
            self.teacher_nll -= float(targets.label_logprob.sum(dtype=np.float64))
            self.unbiased &= metadata.sketch_class.is_unbiased
            yield sequence, entries_of(targets, tau=metadata.tau)

    def add(self, sequence: TokenSequence, scores: LabelScores) -> None:
        before = self.documents.get(sequence.document_id, DocumentSum(nll_nats=0.0, num_labels=0))
        self.documents[sequence.document_id] = DocumentSum(
            nll_nats=before.nll_nats + float(scores.nll.sum()),
            num_labels=before.num_labels + sequence.num_labels,
        )
        self.num_labels += sequence.num_labels
        self.cross_entropy += float(scores.cross_entropy.sum())
        self.entropy += float(scores.entropy.sum())
        places = np.ceil(scores.confidence * self.num_bins).astype(np.int64) - 1
        places = np.clip(places, 0, self.num_bins - 1)
        values = (np.ones(len(places)), scores.confidence, scores.correct)
        for column, weights in enumerate(values):
            self.bins[:, column] += np.bincount(places, weights=weights, minlength=self.num_bins)

    def means(self) -> HoldoutScores:
        nats = math.fsum(document.nll_nats for document in self.documents.values())
        kl = (self.cross_entropy - self.target_entropy) / self.num_labels
        return HoldoutScores(
            human_nll_nats=nats / self.num_labels,
            bits_per_byte=nats / math.log(2) / max(self.num_bytes, 1),
            kl_to_teacher_nats=kl if self.unbiased else None,
            teacher_nll_nats=self.teacher_nll / self.num_labels,
            ece=float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()) / self.num_labels,
            accuracy=float(self.bins[:, 2].sum()) / self.num_labels,
            mean_entropy_nats=self.entropy / self.num_labels,
            num_labels=self.num_labels,
            num_sequences=self.num_sequences,
            num_bytes=self.num_bytes,
            reliability=tuple(_reliability(self.bins)),
            documents=dict(sorted(self.documents.items())),
        )


def _reliability(bins: NDArray[np.float64]) -> Iterator[ReliabilityBin]:
    for index, (count, confidence, correct) in enumerate(bins.tolist()):
        yield ReliabilityBin(
            lower=index / len(bins),
            upper=(index + 1) / len(bins),
            num_labels=int(count),
            confidence=confidence / max(count, 1),
            accuracy=correct / max(count, 1),
        )
