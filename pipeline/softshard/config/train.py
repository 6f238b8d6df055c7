"""How the student is trained, on which retention text, and the baseline that it is compared with."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from softshard.config.adapter import (
    ADAPTER_HELP,
    DECODER_ADAPTERS,
    AdapterKind,
    DataType,
    Device,
    LoraSettings,
    OptimizerSettings,
)
from softshard.config.base import KeyInvalid, Settings
from softshard.config.corpus import SourceSettings, refuse_equal_names
from softshard.config.data import BalanceSettings, LabelWeightSettings, MoreTargetsSettings, WhereSettings
from softshard.config.sketch import SketchSettings

__all__ = [
    "LINEAR_DIVERGENCES",
    "BaselineSettings",
    "Divergence",
    "RetentionSettings",
    "SweepSettings",
    "TrainSettings",
]


Divergence = Literal["forward", "reverse", "jensen_shannon"]
"""Each has one entry in `finetune.loss.divergences.DIVERGENCES`."""
LINEAR_DIVERGENCES: frozenset[Divergence] = frozenset(("forward",))
"""Divergences that are linear in the target, so unbiased for an unbiased sketch, and finite for a label alone."""


class RetentionSettings(Settings):
    """A loss on other data, so that the model keeps what it knew."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    """Text outside the style, read and split like the corpus."""
    weight: float = Field(default=0.1, ge=0)
    """Retention weight lambda."""
    objective: Literal["kl", "ce"] = "kl"
    """`kl`: full KL to the frozen base model; `ce`: cross-entropy on the text."""
    batch_tokens: int = Field(default=512, ge=1)
    """Token budget of the retention batch of each step."""

    @model_validator(mode="after")
    def _consistent(self) -> RetentionSettings:
        refuse_equal_names(self.sources)
        return self


class BaselineSettings(Settings):
    """Ordinary fine-tuning on the same tokens with the same number of steps, at its own best learning rate."""

    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(5e-4, 1e-3, 2e-3), min_length=1)
    """Each is trained in full; the best on the hold-out is the baseline, a choice that favours the baseline."""
    retention_weight: float = Field(default=0.0, ge=0)
    """Retention weight of the baseline; ordinary fine-tuning has none."""


class SweepSettings(Settings):
    """One training for every combination of these values, on the same targets; the best one gives the adapter.

    The best has the lowest NLL on the hold-out. The loss of each on the retention text is reported with it.
    """

    alpha: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Values of `train.alpha`."""
    retention_weight: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Values of `train.retention.weight`."""
    learning_rate: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Values of `train.optimizer.learning_rate`."""

    @model_validator(mode="after")
    def _varies(self) -> SweepSettings:
        lists = [self.alpha, self.retention_weight, self.learning_rate]
        if not any(lists):
            raise ValueError("needs a list of values for alpha, retention_weight or learning_rate")
        if any(len(set(values)) < len(values) for values in lists):
            raise ValueError("a value is given twice")
        return self


class TrainSettings(Settings):
    """KL fine-tuning of a light adapter on the stored targets."""

    model: str | None = None
    """Folder or hub name of the student; without it, the teacher's model."""
    revision: str | None = None
    """Revision on the hub."""
    objective: Literal["kl", "ce"] = "kl"
    """`kl`: the stored targets; `ce`: the corpus's own tokens, the same as alpha 1."""
    alpha: float = Field(default=0.75, ge=0, le=1)
    """Human weight: share of the corpus's own token in the target, mixed in when targets are loaded. The default did
    best where teacher and student are of one size, .25 where the student is smaller."""
    truncated: Literal["ghost", "renormalise"] = "ghost"
    """How the loss treats the tokens that a `topk` or `nucleus` sketch leaves out: `ghost` as one token with the mass
    of all of them; `renormalise` scales the stored ones to 1, which teaches that the others are impossible."""
    temperature: float = Field(default=1.0, gt=0)
    """Targets become p^(1 / temperature), renormalised, when they are loaded. Only where this is exact: with `full`,
    and with `topk` and `truncated: renormalise`; for the other kinds, set the temperature in `target`. The report
    compares with the targets as they are stored."""
    match_temperature: bool = False
    """Divide the student's logits by the targets' temperature too (that of `target` times that of `train`), and
    multiply the loss by its square; only with alpha 0, because a label has no temperature."""
    divergence: Divergence = "forward"
    """The divergence to minimise: `forward` KL(target || student), for every kind of target; `reverse` KL(student ||
    target) or `jensen_shannon`, of the distributions with `full`, of the head's tokens and the mass of the rest with
    `topk` and `nucleus` and `truncated: ghost`. A `threshold` sketch would bias them."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Beta of `jensen_shannon`: beta KL(target || m) + (1 - beta) KL(student || m), m being beta of the target and
    1 - beta of the student."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dtype: DataType = "auto"
    """Type of the frozen weights; the adapter is float32. `auto` is bfloat16 where the device has it natively."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; without it, all cores."""
    chunk_positions: int = Field(default=512, ge=1)
    """Positions whose logits are in memory at one time in the loss."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Sequences in the buffer in which the stream is shuffled."""
    packing: bool = False
    """One row of tokens per batch, without padding; no attention and no target crosses from one sequence to the next. A
    student whose architecture would mix them is refused."""
    where: WhereSettings = WhereSettings()
    """Which of the job's sequences are trained on."""
    label_weights: LabelWeightSettings = LabelWeightSettings()
    """Weights of labels in the loss, by the style teacher's entropy and log-probability."""
    targets: MoreTargetsSettings | None = None
    """Targets of other jobs; without it, only the job's own."""
    balance: BalanceSettings | None = None
    """Fixed shares of the loss for groups; without it, each group has its share of the tokens."""
    author_cap: float = Field(default=0.6, gt=0, le=1)
    """Largest share that one author may have without `consent`, of the train tokens and of their weight in the loss; 1:
    no limit."""
    sweep: SweepSettings | None = None
    """Several trainings, of which the best gives the adapter; without it, one training."""
    adapter: AdapterKind = Field(
        default="lora",
        description=f"Where the adapter is: {'; '.join(f'`{kind}` {place}' for kind, place in ADAPTER_HELP.items())}.",
    )
    lora: LoraSettings = LoraSettings()
    """Shape of the adapter: rank, alpha and dropout for every kind; the layers, for LoRA in the decoder."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How it is trained."""
    retention: RetentionSettings | None = None
    """The loss on other data; without it, none."""
    baseline: BaselineSettings | None = BaselineSettings()
    """The fine-tuning that the adapter is compared with; null: none."""

    @property
    def alphas(self) -> tuple[float, ...]:
        """Every alpha of the trainings, without the baseline's."""
        if self.objective == "ce":
            return (1.0,)
        return (self.sweep.alpha if self.sweep is not None else ()) or (self.alpha,)

    @property
    def num_trainings(self) -> int:
        """Number of trainings of which one gives the adapter: 1 without a sweep."""
        sweep = self.sweep
        lists = () if sweep is None else (sweep.alpha, sweep.retention_weight, sweep.learning_rate)
        return math.prod(len(values) or 1 for values in lists)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.revision is not None and self.model is None:
            raise KeyInvalid("revision", "has no `train.model` that it could be a revision of")
        if self.match_temperature and max(self.alphas) > 0:
            raise ValueError("train.match_temperature needs `objective: kl` and alpha 0: a label has no temperature")
        if self.sweep is not None and self.sweep.alpha and self.objective == "ce":
            raise ValueError("sweep.alpha needs `objective: kl`; `ce` is alpha 1")
        if self.sweep is not None and self.sweep.retention_weight and self.retention is None:
            raise ValueError("sweep.retention_weight needs `retention`, with its sources")
        if self.baseline is not None and self.baseline.retention_weight > 0 and self.retention is None:
            raise ValueError("baseline.retention_weight needs `retention`, with its sources")
        more = self.targets
        if more is not None and more.own_weight == 0 and more.how == "mix" and self.where != WhereSettings():
            raise ValueError("where chooses among the job's own sequences, which targets.own_weight 0 leaves out")
        if more is not None and more.changes and self.balance is not None:
            raise ValueError("balance needs shares of the sets that do not change; targets has weights that do")
        return self

    def problem_with(self, sketch: SketchSettings) -> KeyInvalid | None:
        """Why targets that are stored as `sketch` cannot be trained on with these settings; None where they can."""
        if self.temperature != 1 and not sketch.takes_temperature(renormalised=self.truncated == "renormalise"):
            return KeyInvalid(
                "train.temperature",
                f"{self.temperature:g} cannot be applied at load to targets of kind {sketch.kind};"
                " set target.temperature, which is applied at capture",
            )
        if self.divergence in LINEAR_DIVERGENCES:
            return None
        problem: str | None = None
        if max(self.alphas) == 1:
            problem = "is infinite against a label alone; use `objective: kl` and an alpha below 1"
        elif sketch.samples_tail:
            problem = (
                f"is biased for targets of kind {sketch.kind}, whose tail is sampled; use topk or full, or forward"
            )
        elif sketch.leaves_ghost and self.truncated != "ghost":
            problem = f"needs the mass that {sketch.kind} leaves out; set `train.truncated: ghost`"
        return None if problem is None else KeyInvalid("train.divergence", f"{self.divergence} {problem}")

    @model_validator(mode="after")
    def _adapter_has_its_settings(self) -> TrainSettings:
        given = self.lora.target_modules != "all-linear" or self.lora.last_layers is not None
        if given and self.adapter not in DECODER_ADAPTERS:
            problem = f"`adapter: {self.adapter}` adapts no layer of the decoder"
            raise ValueError(f"{problem}, so leave `lora.target_modules` and `lora.last_layers` out")
        return self
