"""What every teacher engine does: sequences in, sketches out.

Both engines reduce logits with `softshard.sketch.reduce.sketch_rows`, so their sketches agree within the numerical
noise of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from softshard.config import SketchSettings
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence

__all__ = ["Teacher", "TeacherIdentity"]

TeacherIdentity = dict[str, str | int | float | list[str]]
"""Everything of an engine that can change a bit of its logits; it goes into the part's id and metadata."""


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
        """What `score` gives with each of some settings, bit for bit, for one pass of the model."""

    def close(self) -> None:
        """Give back what the engine holds; it scores no more."""
