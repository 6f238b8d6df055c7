"""The settings of a sketch: which entries of a target are stored, how finely, and how many tails."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from softshard.config.base import Settings

__all__ = [
    "FullSketch",
    "NucleusSketch",
    "SketchSettings",
    "ThresholdSketch",
    "TopkSketch",
    "takes_temperature",
]


def _fraction(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


Ratio = Annotated[float, BeforeValidator(_fraction, json_schema_input_type=float | str)]


class _Sketch(Settings):
    temperature: float = Field(default=1.0, ge=0.01)
    """Logits are divided by this at capture, before anything else."""
    step: float = Field(default=0.05, ge=0.002, le=1)
    """Step of the stored head log-probabilities, in nats."""

    @property
    def tail_weight(self) -> float | None:
        """Weight of a sampled tail entry; None where no tail is sampled."""
        return None

    @property
    def num_draws(self) -> int:
        """Independent tails of a label; 1 where no tail is sampled."""
        return 1


_WAYS_TO_TAU = ("tau", "budget_bytes", "max_angle_degrees")


class ThresholdSketch(_Sketch):
    """Threshold sampling (Duffield, Lund, Thorup, 2005): unbiased, least variance for its number of entries."""

    kind: Literal["threshold"] = "threshold"
    tau: Ratio = Field(default=1 / 24, gt=0, le=1)
    """Tokens at least this likely are stored with their probability; of the others each stored one weighs tau.
    A fraction may be written as text: "1/24"."""
    draws: int = Field(default=1, ge=1, le=64)
    """Independent tails that are stored over one head; the training takes another one each epoch."""
    budget_bytes: float | None = Field(default=None, gt=0)
    """Instead of tau: the smallest tau whose parts take at most this many bytes a position, found by a pilot."""
    max_angle_degrees: float | None = Field(default=None, gt=0, lt=90)
    """Instead of tau: the largest tau whose gradient angle is at most this, found by a pilot."""

    @model_validator(mode="after")
    def _one_way_to_tau(self) -> ThresholdSketch:
        given = [name for name in _WAYS_TO_TAU if name in self.model_fields_set and getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be given together: each decides tau")
        return self

    @model_serializer(mode="wrap")
    def _what_decides(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        kept = next((name for name in _WAYS_TO_TAU[1:] if values.get(name) is not None), "tau")
        return {name: value for name, value in values.items() if name == kept or name not in _WAYS_TO_TAU}

    @property
    def tail_weight(self) -> float:
        """Tau."""
        return self.tau

    @property
    def num_draws(self) -> int:
        """As the job has it."""
        return self.draws

    @property
    def is_resolved(self) -> bool:
        """Whether tau is given, not yet to be found by a pilot."""
        return self.budget_bytes is None and self.max_angle_degrees is None


class TopkSketch(_Sketch):
    """The k most likely tokens and the exact mass of the rest."""

    kind: Literal["topk"]
    k: int = Field(default=64, ge=1)
    """Entries."""


class NucleusSketch(_Sketch):
    """The smallest set of tokens with a given mass, and the exact mass of the rest."""

    kind: Literal["nucleus"]
    mass: float = Field(default=0.95, gt=0, lt=1)
    """Mass of the set."""
    max_entries: int = Field(default=512, ge=1)
    """Most entries; a set that needs more is cut there."""


class FullSketch(_Sketch):
    """Every token of the vocabulary; for small vocabularies and for checking the others."""

    kind: Literal["full"]


SketchSettings = Annotated[ThresholdSketch | TopkSketch | NucleusSketch | FullSketch, Field(discriminator="kind")]


def takes_temperature(kind: str, *, renormalised: bool) -> bool:
    """Whether p^(1 / T) of what is stored, renormalised, is that of the target: the whole one, or a head put for it."""
    return kind == "full" or (kind == "topk" and renormalised)
