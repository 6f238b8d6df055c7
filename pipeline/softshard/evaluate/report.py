"""The record of an evaluation: what `metrics.json` holds and the page shows. Metrics themselves are in `metrics.py`."""

from __future__ import annotations

from typing import Any, Literal

from softshard.evaluate.metrics import HumanMetrics, ModelMetrics
from softshard.evaluate.record import Record

__all__ = [
    "BaselineChoice",
    "Example",
    "HoldoutSummary",
    "NllDifference",
    "Report",
    "SweepRow",
    "TargetsSummary",
    "TrainingStep",
]


class NllDifference(Record):
    """Difference of two models' human_nll_nats on the same labels; below 0, the first is better."""

    difference_nats: float
    standard_error_nats: float | None
    """Over documents; null where there is one document alone."""


class HoldoutSummary(Record):
    """What the models were measured on."""

    documents: int
    sequences: int
    labels: int
    """Tokens that were predicted."""
    num_bytes: int
    """UTF-8 bytes of the text of those tokens."""
    prompts: int
    """Beginnings that each model continued."""
    teacher_nll_nats: float
    """Mean negative log-likelihood of the same labels under the style teacher."""


class TargetsSummary(Record):
    """What the stored targets cost, and how faithful they are."""

    parts: int
    positions: int
    bytes_per_position: float
    """Size of the parts over the number of labels, everything included."""
    mean_entries: float
    """Stored tokens per label."""
    mean_squared_error: float
    """Mean over labels of the summed squared difference of stored weights and probabilities."""
    gradient_angle_degrees: float
    """Mean angle between the gradients that the stored and the whole target give a student that knows nothing."""
    mean_kl_nats: float | None
    """Mean KL(target || stored); null where the stored form does not cover every token."""


class TrainingStep(Record):
    """One logged step."""

    step: int
    loss: float
    retention_loss: float | None
    learning_rate: float


class BaselineChoice(Record):
    """One learning rate that the baseline was trained with."""

    learning_rate: float
    human_nll_nats: float
    """On the hold-out, the one that the report is about."""


class SweepRow(Record):
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


class Example(Record):
    """One beginning and what followed."""

    prompt: str
    human: str
    base: str
    ce: str | None
    adapter: str


class Report(Record):
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
    """Statistics of the corpus, one row per group; every row has the same keys."""
    targets: TargetsSummary
    training: dict[str, tuple[TrainingStep, ...]]
    """Logged steps by what was trained."""
    examples: tuple[Example, ...]

    @property
    def models(self) -> dict[str, ModelMetrics]:
        """Metrics by model: `base`, `ce` where there is a baseline, `adapter`."""
        baseline = {} if self.ce is None else {"ce": self.ce}
        return {"base": self.base, **baseline, "adapter": self.adapter}
