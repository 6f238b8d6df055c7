"""The metrics of an evaluation: each is declared once, and report, page and terminal read it from here.

In: one model's scores and samples, and what people wrote after the same beginnings. Out: numbers, under the keys that
`metrics.json` has. To add a metric, add a field to `ModelMetrics` (and to `HumanMetrics`, if human writing has a value
of its own) and one entry to `METRICS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from softshard.evaluate.record import Record
from softshard.evaluate.text_metrics import (
    distinct_n,
    mattr,
    sentence_length_w1,
    sentence_lengths,
    split_words,
    token_l2,
)

if TYPE_CHECKING:
    from softshard.evaluate.samples import Continuations, Samples
    from softshard.evaluate.scoring import HoldoutScores

__all__ = ["GROUPS", "METRICS", "HumanMetrics", "Measured", "Metric", "ModelMetrics", "Writing"]


class HumanMetrics(Record):
    """The human continuations of the beginnings that the models continue."""

    mattr: float
    """Moving-average type-token ratio, windows of 50 words."""
    distinct_2: float
    """Share of pairs of words that are different ones."""
    distinct_3: float
    """Share of triples of words that are different ones."""
    mean_sentence_words: float
    """Mean length of a sentence in words."""
    mean_sample_tokens: float
    """Mean length in tokens, cut where the samples are cut."""


class ModelMetrics(Record):
    """One model on the hold-out, and its continuations of held-out beginnings beside the human ones."""

    human_nll_nats: float
    """Mean negative log-likelihood of a human token."""
    bits_per_byte: float
    """Negative log-likelihood of the text in bits over its UTF-8 bytes."""
    kl_to_teacher_nats: float | None
    """Mean KL(style teacher || model) by an unbiased estimate; null where the stored targets leave out the tail."""
    ece: float
    """Expected calibration error of the most likely token against the human one, between 0 and 1."""
    accuracy: float
    """Share of human tokens that are the model's most likely one."""
    mean_entropy_nats: float
    """Mean entropy of the model's distribution."""
    mattr: float
    """Moving-average type-token ratio of the samples, windows of 50 words."""
    distinct_2: float
    """Share of the samples' pairs of words that are different ones."""
    distinct_3: float
    """Share of the samples' triples of words that are different ones."""
    sentence_length_w1: float
    """Wasserstein-1 distance, in words, of sentence lengths from the human continuations'."""
    token_l2: float
    """Euclidean distance of token frequencies from the human continuations'."""
    mean_sentence_words: float
    """Mean length of a sample's sentence in words."""
    mean_sample_tokens: float
    """Mean length of a sample in tokens."""
    retention_nll_nats: float | None
    """Mean negative log-likelihood on held-out writing of another kind; null without retention sources."""
    ms_per_token: float
    """Milliseconds per sequence and decoding step while sampling; the sequences of a batch share a step's time."""


class Writing:
    """Continuations, split into words and sentences once for all metrics.

    Sentences and n-grams end where a continuation does.
    """

    def __init__(self, continuations: Continuations) -> None:
        self.token_ids: Sequence[Sequence[int]] = continuations.token_ids
        self._texts = continuations.texts

    @cached_property
    def words(self) -> list[list[str]]:
        """Words of each continuation."""
        return [split_words(text) for text in self._texts]

    @property
    def joined_words(self) -> list[str]:
        """Words of all continuations in the order of their prompts, so that short continuations count too."""
        return list(itertools.chain.from_iterable(self.words))

    @cached_property
    def sentence_lengths(self) -> list[int]:
        """Words of each sentence."""
        return [length for text in self._texts for length in sentence_lengths(text)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model: what its metrics are computed from."""

    scores: HoldoutScores
    samples: Samples
    text: Writing
    """The samples as text."""
    human: Writing
    """What people wrote after the same beginnings."""
    vocab_size: int
    retention_nll_nats: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number about a model. Exactly one of `from_model` and `from_text` computes it."""

    key: str
    """Field of `ModelMetrics`, so the key in `metrics.json`; of `HumanMetrics` too where `from_text` computes it."""
    group: str
    """Section of the page's table, one of `GROUPS`."""
    title: str
    """Name on the page, with the unit."""
    explanation: str
    """One sentence under the name."""
    short_title: str | None = None
    """Name in the table that a run prints in the terminal; None where that table leaves the metric out."""
    better: Literal["low", "high", "human", "none"]
    """Which model is best: the lowest value, the highest, the one nearest to the human value, or none."""
    decimals: int
    is_share: bool = False
    """Whether the page shows the value, which is between 0 and 1, in percent."""
    from_model: Callable[[Measured], float | None] | None = None
    from_text: Callable[[Writing], float] | None = None
    """The same function for the human continuations and for the model's."""

    def measure(self, measured: Measured) -> float | None:
        """The value of a model; None where it does not apply to this job."""
        if self.from_text is not None:
            return self.from_text(measured.text)
        assert self.from_model is not None
        return self.from_model(measured)

    def plain(self, value: float) -> str:
        """The value as the terminal shows it; what rounds to zero has no sign."""
        shown = f"{value:.{self.decimals}f}"
        return shown.removeprefix("-") if float(shown) == 0 else shown

    def shown(self, value: float) -> str:
        """The value as the page shows it."""
        return f"{100 * value:.{self.decimals - 2}f} %" if self.is_share else self.plain(value)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


_PREDICTING = "Predicting human text"
_WRITING = "Writing freely, beside what people wrote"
_COST = "What it keeps and what it costs"

GROUPS = (_PREDICTING, _WRITING, _COST)

METRICS: tuple[Metric, ...] = (
    Metric(
        key="human_nll_nats",
        group=_PREDICTING,
        title="Loss on human text, nats per token",
        short_title="human NLL, nats per token",
        explanation="How surprised the model is, on average, by the next token that a person wrote.",
        better="low",
        decimals=3,
        from_model=lambda measured: measured.scores.human_nll_nats,
    ),
    Metric(
        key="bits_per_byte",
        group=_PREDICTING,
        title="Bits per byte",
        short_title="bits per byte",
        explanation="The same loss as the size to which the model would compress the text.",
        better="low",
        decimals=3,
        from_model=lambda measured: measured.scores.bits_per_byte,
    ),
    Metric(
        key="kl_to_teacher_nats",
        group=_PREDICTING,
        title="Distance from the style teacher, nats",
        short_title="KL to the style teacher, an estimate",
        explanation="Mean KL divergence of the model from the teacher’s whole distribution.",
        better="low",
        decimals=3,
        from_model=lambda measured: measured.scores.kl_to_teacher_nats,
    ),
    Metric(
        key="ece",
        group=_PREDICTING,
        title="Calibration error",
        short_title="calibration error",
        explanation="How far the model’s confidence lies from how often it is right.",
        better="low",
        decimals=3,
        is_share=True,
        from_model=lambda measured: measured.scores.ece,
    ),
    Metric(
        key="accuracy",
        group=_PREDICTING,
        title="Right first guess",
        explanation="How often the most likely token is the one that the person wrote.",
        better="high",
        decimals=3,
        is_share=True,
        from_model=lambda measured: measured.scores.accuracy,
    ),
    Metric(
        key="mean_entropy_nats",
        group=_PREDICTING,
        title="Entropy, nats",
        explanation="How open the model holds the next token. Near the loss when it is well calibrated.",
        better="none",
        decimals=2,
        from_model=lambda measured: measured.scores.mean_entropy_nats,
    ),
    Metric(
        key="mattr",
        group=_WRITING,
        title="Variety of words (MATTR)",
        short_title="MATTR of samples",
        explanation="Share of different words within any 50 in a row.",
        better="human",
        decimals=3,
        from_text=lambda text: mattr(text.joined_words),
    ),
    Metric(
        key="distinct_2",
        group=_WRITING,
        title="Distinct pairs of words",
        explanation="Share of word pairs that are different ones; low means stock phrases.",
        better="human",
        decimals=3,
        from_text=lambda text: distinct_n(text.words, n=2),
    ),
    Metric(
        key="distinct_3",
        group=_WRITING,
        title="Distinct triples of words",
        explanation="The same for three words in a row.",
        better="human",
        decimals=3,
        from_text=lambda text: distinct_n(text.words, n=3),
    ),
    Metric(
        key="sentence_length_w1",
        group=_WRITING,
        title="Sentence lengths, distance in words",
        short_title="sentence length W1, words",
        explanation="By how many words lengths differ when short is matched with short and long with long.",
        better="low",
        decimals=2,
        from_model=lambda measured: sentence_length_w1(measured.text.sentence_lengths, measured.human.sentence_lengths),
    ),
    Metric(
        key="token_l2",
        group=_WRITING,
        title="Token frequencies, distance",
        short_title="token frequency L2",
        explanation="Euclidean distance of the frequencies of all tokens.",
        better="low",
        decimals=4,
        from_model=lambda measured: token_l2(
            measured.text.token_ids, measured.human.token_ids, vocab_size=measured.vocab_size
        ),
    ),
    Metric(
        key="mean_sentence_words",
        group=_WRITING,
        title="Words per sentence",
        explanation="Mean length of a sentence.",
        better="human",
        decimals=1,
        from_text=lambda text: _mean(text.sentence_lengths),
    ),
    Metric(
        key="mean_sample_tokens",
        group=_WRITING,
        title="Tokens per continuation",
        explanation="Mean length, up to the limit; shorter where a text was brought to an end.",
        better="none",
        decimals=1,
        from_text=lambda text: _mean([len(token_ids) for token_ids in text.token_ids]),
    ),
    Metric(
        key="retention_nll_nats",
        group=_COST,
        title="Loss on other writing, nats per token",
        short_title="retention NLL",
        explanation="The same loss on held-out text of another kind: what the model still knows.",
        better="low",
        decimals=3,
        from_model=lambda measured: measured.retention_nll_nats,
    ),
    Metric(
        key="ms_per_token",
        group=_COST,
        title="Milliseconds per token",
        short_title="ms per token",
        explanation="Time of one decoding step per sequence, on the machine of this run.",
        better="none",
        decimals=1,
        from_model=lambda measured: measured.samples.ms_per_token,
    ),
)
"""In the order of the fields of `ModelMetrics`, which the terminal follows."""
