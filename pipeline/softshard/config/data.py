"""Which targets a training reads, the job's own and those of other jobs, and how much each counts in the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from softshard.config.base import Settings
from softshard.config.corpus import output_uri

__all__ = [
    "BalanceSettings",
    "LabelWeightSettings",
    "MoreTargetsSettings",
    "OtherSetSettings",
    "WeightOverSteps",
    "WhereSettings",
    "weight_at",
]

_Range = tuple[float, float]
_NotNegative = Annotated[float, Field(ge=0)]
WeightOverSteps = _NotNegative | tuple[tuple[Annotated[int, Field(ge=0)], _NotNegative], ...]
"""A weight, or points (step, weight) in ascending order of steps, with linear interpolation between them."""


class WhereSettings(Settings):
    """A filter on sequences: all conditions must hold. Row groups that Parquet's statistics rule out are not read."""

    source: tuple[str, ...] | None = None
    """Names of sources."""
    style: tuple[str, ...] | None = None
    """Styles."""
    group: tuple[str, ...] | None = None
    """Authors, or other groups."""
    mean_entropy: _Range | None = None
    """Least and most mean entropy of a sequence's targets, in nats."""
    mean_label_logprob: _Range | None = None
    """Least and most mean log-probability of a sequence's own tokens under the style teacher, in nats."""

    @model_validator(mode="after")
    def _ranges(self) -> WhereSettings:
        for name in ("mean_entropy", "mean_label_logprob"):
            if (wanted := getattr(self, name)) is not None and wanted[0] > wanted[1]:
                raise ValueError(f"{name} must be [least, most], and no sequence is within {list(wanted)}")
        return self


class LabelWeightSettings(Settings):
    """Weight of a label in the loss: the product of two functions, each a list of [value, weight], values ascending."""

    entropy: tuple[tuple[float, _NotNegative], ...] = ()
    """Weight by the target's entropy, in nats: linear between the points, constant outside them; 1 without points."""
    label_logprob: tuple[tuple[float, _NotNegative], ...] = ()
    """Weight by the log-probability of the text's own token, in nats, in the same form."""

    @field_validator("entropy", "label_logprob")
    @classmethod
    def _rising(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        _refuse_unless_rising([value for value, _ in points])
        if points and not any(weight for _, weight in points):
            raise ValueError("every weight is 0, which leaves no label to train on")
        return points


class OtherSetSettings(Settings):
    """The targets of another job."""

    out: str = Field(min_length=1)
    """Output folder of that job, or `s3://bucket/prefix`."""
    manifest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Digest of one of its manifests; without it, the newest."""
    weight: WeightOverSteps = 1.0
    """Share of the tokens (`mix`) or of the target (`blend`), relative to those of the other sets. In a mix it may be
    [[step, weight], ...], steps ascending, and is linear between the steps."""
    where: WhereSettings = WhereSettings()
    """Sequences of this set to train on; in a blend, `train.where` decides instead."""

    @field_validator("out")
    @classmethod
    def _plain_path(cls, value: str) -> str:
        return output_uri(value)

    @field_validator("weight")
    @classmethod
    def _usable(cls, value: WeightOverSteps) -> WeightOverSteps:
        return _usable_weight(value)


class MoreTargetsSettings(Settings):
    """Targets of other jobs to train on, together with this job's own or instead of them."""

    how: Literal["mix", "blend"] = "mix"
    """`mix`: batches alternate between the sets, by shares of tokens; `blend`: the sets hold the same sequences, and
    the target of a label is the weighted mean of theirs."""
    own_weight: WeightOverSteps = 1.0
    """Weight of this job's own targets; 0: they are not trained on, and only give the hold-out."""
    others: tuple[OtherSetSettings, ...] = Field(min_length=1)
    """The other sets; in a blend, they must hold the same sequences."""

    @field_validator("own_weight")
    @classmethod
    def _usable(cls, value: WeightOverSteps) -> WeightOverSteps:
        return _usable_weight(value)

    @model_validator(mode="after")
    def _consistent(self) -> MoreTargetsSettings:
        weights = [self.own_weight, *(other.weight for other in self.others)]
        if self.how == "blend":
            if self.changes:
                raise ValueError("the weights of a blend cannot change with the step; use `how: mix`")
            if any(other.where != WhereSettings() for other in self.others):
                raise ValueError("the sets of a blend share one filter; use `train.where`")
        starts = {0, *(step for weight in weights if isinstance(weight, tuple) for step, _ in weight)}
        if any(all(weight_at(weight, step) == 0 for weight in weights) for step in starts):
            raise ValueError("at each step some set needs a weight above 0")
        if unused := [other.out for other in self.others if other.weight == 0]:
            raise ValueError(f"weight 0 leaves {unused[0]} out at every step; give it one above 0, or do not name it")
        return self

    @property
    def changes(self) -> bool:
        """Whether a weight changes with the step."""
        return any(isinstance(weight, tuple) for weight in (self.own_weight, *(other.weight for other in self.others)))


class BalanceSettings(Settings):
    """Weights that give groups of sequences fixed shares of the loss."""

    column: Literal["group", "source", "style", "document_id", "fold"] = "group"
    """The column of the targets by which sequences are grouped; `group` is the author."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] | Literal["equal"] = "equal"
    """Share of the loss by group; groups that are not named share the rest by size. `equal`: the same for every
    group."""
    clip: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.25, 4.0)
    """Least and greatest weight of a group; where a share would need another weight it is not reached, and the
    adapter's card says so."""

    @model_validator(mode="after")
    def _consistent(self) -> BalanceSettings:
        if self.clip[0] > self.clip[1]:
            raise ValueError(f"clip must be [least, most], not {list(self.clip)}")
        if isinstance(self.shares, dict) and not 0 < sum(self.shares.values()) <= 1 + 1e-9:
            raise ValueError(
                f"shares sum to {sum(self.shares.values()):g}; they must sum to 1, or leave the others some"
            )
        return self


def _usable_weight(weight: WeightOverSteps) -> WeightOverSteps:
    """The weight, as a number where it is the same at all steps. Raises ValueError for no points or unsorted steps."""
    if not isinstance(weight, tuple):
        return weight
    if not weight:
        raise ValueError("a weight that changes needs [step, weight] at least once")
    _refuse_unless_rising([step for step, _ in weight])
    values = {value for _, value in weight}
    return values.pop() if len(values) == 1 else weight


def weight_at(weight: WeightOverSteps, step: int) -> float:
    """The weight at a step: linear between the points, constant outside them."""
    if not isinstance(weight, tuple):
        return weight
    before = [point for point in weight if point[0] <= step] or [weight[0]]
    after = [point for point in weight if point[0] >= step] or [weight[-1]]
    (first, low), (last, high) = before[-1], after[0]
    return low if first >= last else low + (high - low) * (step - first) / (last - first)


def _refuse_unless_rising(values: list[float] | list[int]) -> None:
    if values != sorted(set(values)):
        raise ValueError(f"points must be in ascending order, not {values}")
