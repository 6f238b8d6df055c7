"""What an engine provides, and what a teacher that it has opened does: sequences in, sketches out.

All engines reduce logits with `softshard.sketch.reduce.sketch_rows`, so their sketches agree within the numerical noise
of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from softshard.config import DataType, SketchSettings, TeacherSettings
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence

__all__ = ["Engine", "Teacher", "TeacherIdentity"]

TeacherIdentity = dict[str, str | int | float | list[str]]
"""Everything about an engine that can change a bit of its logits; it is part of a part's id and metadata."""


class Engine(Protocol):
    """A kind of engine: the module `softshard.teacher.NAME_engine` has these functions and this constant."""

    AVERAGES_ADAPTERS: bool
    """Whether it can score with the mean of the distributions of several adapters."""

    def process_identity(self, device: str, dtype: DataType) -> dict[str, str]:
        """The part of an identity that depends on the process: versions, kind of device, type.

        Raises:
            EngineMissing: the engine is not installed.
        """

    def engine_identity(
        self, settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
    ) -> TeacherIdentity:
        """Identity of the engine, known before it is opened. `weights` and `adapters` are digests."""

    def open_engine(
        self, folder: Path, *, adapters: Sequence[Path], identity: TeacherIdentity, device: str, vocab_size: int
    ) -> Teacher:
        """Load a model with its adapters, none or one, or several where the engine averages them."""


class Teacher(Protocol):
    """A model, or several whose distributions are averaged, ready to score sequences."""

    @property
    def identity(self) -> TeacherIdentity:
        """Engine, versions, dtype, threads, batch budget, digests of weights and adapters."""

    def score(
        self, sequences: Sequence[TokenSequence], *, sketch: SketchSettings, seed: int
    ) -> tuple[list[SequenceTargets], FidelitySums]:
        """Targets of each sequence, in the order given, and how faithful their stored form is.

        The result is a function of the sequences, the settings, the seed and the identity; random numbers are keyed
        by (seed, sequence id, label).

        Raises:
            LogitsInvalid: the model gave NaN or +inf.
        """

    def score_each(
        self, sequences: Sequence[TokenSequence], *, sketches: Sequence[SketchSettings], seed: int
    ) -> list[tuple[list[SequenceTargets], FidelitySums]]:
        """The results of `score` with each of some settings, bit for bit, from one pass of the model."""

    def close(self) -> None:
        """Release the memory of the engine; it cannot score afterwards."""
