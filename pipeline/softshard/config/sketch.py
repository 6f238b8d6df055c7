"""The kinds of sketch: their settings, and what each kind says of itself to the code that writes, reads and trains.

`SketchSettings` lists the kinds. A new kind is one class here, added to that union; everything else asks it. A reader
that knows only the stored name of a kind finds the class with `sketch_class`, stored settings with `parse_sketch`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from softshard.config.base import Settings

__all__ = [
    "SKETCH_KINDS",
    "FullSketch",
    "NucleusSketch",
    "SketchClass",
    "SketchSettings",
    "ThresholdSketch",
    "TopkSketch",
    "parse_sketch",
    "sketch_class",
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
    """Settings that all kinds have, and the facts that each kind states about itself."""

    temperature: float = Field(default=1.0, ge=0.01)
    """Logits are divided by this at capture, before anything else."""
    step: float = Field(default=0.05, ge=0.002, le=1)
    """Step of the stored head log-probabilities, in nats."""
    encoding: Literal["compact", "portable"] = Field(default="compact", exclude_if=lambda value: value == "compact")
    """How Parquet encodes the numbers of a part: `compact` needs pyarrow, polars or DuckDB from 2.0 on; `portable`
    takes more bytes and is read by older DuckDB and by fastparquet too."""

    is_unbiased: ClassVar[bool]
    """Whether the expectation of the stored sketch, before rounding, is the target itself, token by token."""
    covers_vocabulary: ClassVar[bool] = False
    """Whether every token is stored with its probability, so that KL(target || stored) is defined."""
    samples_tail: ClassVar[bool] = False
    """Whether tokens outside the head are sampled; each sampled entry has the weight `tail_weight`."""
    leaves_ghost: ClassVar[bool] = False
    """Whether tokens are left out of which only the total mass is stored, which a ghost token can carry in the loss."""

    @classmethod
    def takes_temperature(cls, *, renormalised: bool) -> bool:
        """Whether raising stored probabilities to 1 / T and renormalising gives the target at temperature T exactly.

        `renormalised`: the head is scaled to a sum of 1, and so stands for the whole distribution.
        """
        return cls.covers_vocabulary

    @classmethod
    def pilot_ladder(cls, like: SketchSettings, *, vocab_size: int) -> tuple[Self, ...]:
        """Settings of this kind that every pilot measures, with the other settings of `like`."""
        return ()

    @property
    @abstractmethod
    def setting(self) -> str:
        """The value that sets the size of the sketch, in a few characters for people, such as 1/24."""

    @property
    def max_head_entries(self) -> int | None:
        """Most entries of a head that consists of the most likely tokens; None: no limit."""
        return None

    @property
    def head_mass(self) -> float | None:
        """Mass at which a head that consists of the most likely tokens ends; None: at `max_head_entries`."""
        return None

    @property
    def tail_weight(self) -> float | None:
        """Weight of a sampled tail entry; None for the kinds that do not sample a tail."""
        return None

    @property
    def num_draws(self) -> int:
        """Independent tails per label; 1 for the kinds that do not sample a tail."""
        return 1

    @property
    def part_settings(self) -> dict[str, float]:
        """Settings of this kind alone that the metadata of a part holds, by their names there."""
        return {}

    @property
    def is_resolved(self) -> bool:
        """Whether the settings are complete; False: a pilot has to find the rest for a budget."""
        return True

    @property
    def budget(self) -> str | None:
        """The budget for which a pilot finds the settings, as the job file has it; None without one."""
        return None


def _shared(sketch: _Sketch) -> dict[str, Any]:
    """The settings that all kinds have."""
    return {name: getattr(sketch, name) for name in _Sketch.model_fields}


_WAYS_TO_TAU = ("tau", "budget_bytes", "max_angle_degrees")


class ThresholdSketch(_Sketch):
    """Threshold sampling (Duffield, Lund, Thorup, 2005): unbiased, of least variance for its number of entries."""

    is_unbiased = True
    samples_tail = True

    kind: Literal["threshold"] = "threshold"
    """Also the kind of a `target` that names none."""
    tau: Ratio = 1 / 24
    """Threshold, from 1/32768 to 1: tokens at least this likely are stored with their probability, and each sampled one
    of the others weighs tau. A fraction may be written as text: "1/24"."""
    draws: int = Field(default=1, ge=1, le=64)
    """Independent tails stored over one head; each epoch of a training takes the next."""
    budget_bytes: float | None = Field(default=None, gt=0)
    """Instead of tau: the smallest tau whose parts take at most this many bytes per position, found by a pilot."""
    max_angle_degrees: float | None = Field(default=None, gt=0, lt=90)
    """Instead of tau: the largest tau whose gradient angle is at most this, found by a pilot."""

    @field_validator("tau")
    @classmethod
    def _in_range(cls, tau: float) -> float:
        if not 2**-15 <= tau <= 1:
            raise ValueError(f"must be from 1/32768 to 1, not {tau:g}; `kind: full` stores every token")
        return tau

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

    @classmethod
    def with_n(cls, n: int, *, like: SketchSettings) -> ThresholdSketch:
        """The threshold 1/n with the draws and what all kinds have from other settings."""
        return cls(tau=1 / n, draws=like.num_draws, **_shared(like))

    @classmethod
    def pilot_ladder(cls, like: SketchSettings, *, vocab_size: int) -> tuple[ThresholdSketch, ...]:
        """Thresholds from 1/6 to 1/128."""
        return tuple(cls.with_n(n, like=like) for n in (6, 8, 12, 16, 24, 32, 48, 64, 96, 128))

    @property
    def setting(self) -> str:
        """Tau, as a fraction where it is one; `x2`: two draws."""
        n = round(1 / self.tau)
        return (f"1/{n}" if 1 / n == self.tau else f"{self.tau:.3g}") + (f" x{self.draws}" if self.draws > 1 else "")

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
        """Whether tau is given."""
        return self.budget is None

    @property
    def budget(self) -> str | None:
        """`budget_bytes` or `max_angle_degrees` with its value."""
        if self.budget_bytes is not None:
            return f"budget_bytes {self.budget_bytes:g}"
        return None if self.max_angle_degrees is None else f"max_angle_degrees {self.max_angle_degrees:g}"


class TopkSketch(_Sketch):
    """The k most likely tokens and the exact mass of the rest."""

    is_unbiased = False
    leaves_ghost = True

    kind: Literal["topk"]
    k: int = Field(default=64, ge=1)
    """Entries."""

    @classmethod
    def takes_temperature(cls, *, renormalised: bool) -> bool:
        """Where the head is renormalised: the same k tokens are the most likely at every temperature."""
        return renormalised

    @classmethod
    def pilot_ladder(cls, like: SketchSettings, *, vocab_size: int) -> tuple[TopkSketch, ...]:
        """16, 64 and 256 entries."""
        return tuple(cls(kind="topk", k=k, **_shared(like)) for k in (16, 64, 256))

    @property
    def setting(self) -> str:
        """k."""
        return str(self.k)

    @property
    def max_head_entries(self) -> int:
        """k."""
        return self.k

    @property
    def part_settings(self) -> dict[str, float]:
        """`k`."""
        return {"k": self.k}


class NucleusSketch(_Sketch):
    """The smallest set of tokens with a given mass, and the exact mass of the rest."""

    is_unbiased = False
    leaves_ghost = True

    kind: Literal["nucleus"]
    mass: float = Field(default=0.95, gt=0, lt=1)
    """Mass of the set."""
    max_entries: int = Field(default=512, ge=1)
    """Most entries; a set that needs more is cut there."""

    @classmethod
    def pilot_ladder(cls, like: SketchSettings, *, vocab_size: int) -> tuple[NucleusSketch, ...]:
        """90% and 95% of the mass, in at most 512 entries."""
        return tuple(cls(kind="nucleus", mass=mass, max_entries=512, **_shared(like)) for mass in (0.9, 0.95))

    @property
    def setting(self) -> str:
        """Mass and most entries."""
        return f"{self.mass:g}/{self.max_entries}"

    @property
    def max_head_entries(self) -> int:
        """As the job has it."""
        return self.max_entries

    @property
    def head_mass(self) -> float:
        """As the job has it."""
        return self.mass

    @property
    def part_settings(self) -> dict[str, float]:
        """`nucleus_mass`."""
        return {"nucleus_mass": self.mass}


_LARGEST_FULL_IN_PILOT = 4096


class FullSketch(_Sketch):
    """Every token of the vocabulary; for small vocabularies and for checking the others."""

    is_unbiased = True
    covers_vocabulary = True

    kind: Literal["full"]

    @classmethod
    def pilot_ladder(cls, like: SketchSettings, *, vocab_size: int) -> tuple[FullSketch, ...]:
        """The whole distribution, where the vocabulary has at most 4,096 tokens."""
        if vocab_size > _LARGEST_FULL_IN_PILOT:
            return ()
        return (cls(kind="full", **_shared(like)),)

    @property
    def setting(self) -> str:
        """`all`."""
        return "all"


_AnySketch = ThresholdSketch | TopkSketch | NucleusSketch | FullSketch
SketchClass = type[_AnySketch]


def _with_default_kind(value: Any) -> Any:
    return {"kind": "threshold", **value} if isinstance(value, dict) and "kind" not in value else value


SketchSettings = Annotated[_AnySketch, Field(discriminator="kind"), BeforeValidator(_with_default_kind)]
"""Settings of any kind. A mapping without `kind` is a threshold."""
SKETCH_KINDS: dict[str, SketchClass] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(_AnySketch)
}
"""The kinds by name, in the order in which people see them."""
_ADAPTER: TypeAdapter[SketchSettings] = TypeAdapter(SketchSettings)


def sketch_class(kind: str) -> SketchClass:
    """The class of a kind, which states what the kind does. Raises ValueError for a name that no kind has."""
    if kind not in SKETCH_KINDS:
        raise ValueError(f"unknown kind of sketch {kind!r}; the kinds are {', '.join(SKETCH_KINDS)}")
    return SKETCH_KINDS[kind]


def parse_sketch(stored: Mapping[str, Any]) -> SketchSettings:
    """Settings from a stored mapping, such as the `target` of a manifest. Raises ValueError where it is not one."""
    try:
        return _ADAPTER.validate_python(dict(stored))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error
