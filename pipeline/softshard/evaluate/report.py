"""The record of an evaluation, and its two files.

In: the numbers of a run. Out: `metrics.json`, the record as canonical JSON with `base`, `ce` and `adapter` at its top,
and `index.html`, one page that needs nothing beside it. Both are a function of what is given: same input, same bytes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from softshard.evaluate.plots import FigureData
from softshard.records.canonical import canonical_json
from softshard.storage import Store

__all__ = [
    "BaselineChoice",
    "Example",
    "HoldoutSummary",
    "HumanMetrics",
    "ModelMetrics",
    "NllDifference",
    "Report",
    "SweepRow",
    "TargetsSummary",
    "TrainingStep",
    "write_report",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class HumanMetrics(_Record):
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


class ModelMetrics(_Record):
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
    """Milliseconds a sequence and decoding step while sampling, shared by the sequences of a batch."""


class NllDifference(_Record):
    """Difference of two models' human_nll_nats on the same labels; below 0, the first is better."""

    difference_nats: float
    standard_error_nats: float | None
    """Over documents; null where there is one document alone."""


class HoldoutSummary(_Record):
    """What the models were measured on."""

    documents: int
    sequences: int
    labels: int
    """Tokens that were predicted."""
    num_bytes: int
    """UTF-8 bytes of the text that they stand for."""
    prompts: int
    """Beginnings that each model continued."""
    teacher_nll_nats: float
    """Mean negative log-likelihood of the same labels under the style teacher."""


class TargetsSummary(_Record):
    """What the stored targets cost, and how faithful they are."""

    parts: int
    positions: int
    bytes_per_position: float
    """Bytes of the parts over labels, everything included."""
    mean_entries: float
    """Stored tokens a label."""
    mean_squared_error: float
    """Mean over labels of the summed squared difference of stored weights and probabilities."""
    gradient_angle_degrees: float
    """Mean angle between the gradients that the stored and the whole target give a student that knows nothing."""
    mean_kl_nats: float | None
    """Mean KL(target || stored); null where the stored form does not cover every token."""


class TrainingStep(_Record):
    """One logged step."""

    step: int
    loss: float
    retention_loss: float | None
    learning_rate: float


class BaselineChoice(_Record):
    """One learning rate that the baseline was trained with."""

    learning_rate: float
    human_nll_nats: float
    """On the hold-out, the one that the report is about."""


class SweepRow(_Record):
    """One training of a sweep."""

    alpha: float
    retention_weight: float
    learning_rate: float
    human_nll_nats: float | None
    """On the hold-out, by which one was chosen."""
    retention_nll_nats: float | None
    """On held-out writing of another kind; null without retention sources."""
    chosen: bool
    """Whether this is the report's adapter."""


class Example(_Record):
    """One beginning and what followed."""

    prompt: str
    human: str
    base: str
    ce: str | None
    adapter: str


class Report(_Record):
    """A whole evaluation."""

    schema_version: Literal[1] = 1
    job: str
    """Name of the job."""
    manifest: str
    """Digest of the manifest of the targets."""
    settings: dict[str, Any]
    """The job, defaults included."""
    holdout: HoldoutSummary
    human: HumanMetrics
    base: ModelMetrics
    """The model before any training."""
    ce: ModelMetrics | None
    """Ordinary fine-tuning on the same tokens; null when the job has no baseline."""
    adapter: ModelMetrics
    """The fine-tuned adapter on the model."""
    adapter_minus_base: NllDifference
    adapter_minus_ce: NllDifference | None
    baseline_choice: tuple[BaselineChoice, ...]
    """Learning rates that were tried for `ce`; the best is reported."""
    sweep: tuple[SweepRow, ...] = ()
    """Trainings that the adapter was chosen from; empty without a sweep."""
    corpus: tuple[dict[str, str | int | float], ...]
    """Statistics of the corpus, a row a group; every row has the same keys."""
    targets: TargetsSummary
    training: dict[str, tuple[TrainingStep, ...]]
    """Logged steps by what was trained."""
    examples: tuple[Example, ...]


def write_report(report: Report, *, figures: FigureData, store: Store) -> None:
    """Write `metrics.json` and, last, `index.html` at the top of `store`, in place of what is there.

    Raises:
        StorageFull: no space is left; a file is written whole or not at all.
    """
    from softshard.evaluate.page import render_page

    page = render_page(report, figures=figures)
    store.replace("metrics.json", canonical_json(report))
    store.replace("index.html", page.encode())
