"""A whole job, and the checks between its sections."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from softshard.config.base import KeyInvalid, Settings
from softshard.config.cluster import ClusterSettings
from softshard.config.corpus import CorpusSettings, output_uri
from softshard.config.sketch import SketchSettings, ThresholdSketch
from softshard.config.teacher import TeacherSettings
from softshard.config.train import TrainSettings

__all__ = [
    "EvaluateSettings",
    "Job",
]


class EvaluateSettings(Settings):
    """What the report measures."""

    num_samples: int = Field(default=24, ge=1)
    """Held-out prompts that each model continues: the beginnings of documents."""
    prompt_tokens: int = Field(default=24, ge=1)
    """Tokens of a prompt; the prompt of a conversation is all that comes before its first answer."""
    sample_tokens: int = Field(default=96, ge=8)
    """Most tokens of a continuation."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; samples come from the whole distribution, without top-k or nucleus truncation."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Token budget of a scoring batch."""
    calibration_bins: int = Field(default=15, ge=2)
    """Bins of equal width of the calibration error."""


class Job(Settings):
    """A whole run, from human writing to an adapter and its report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the job; an output folder belongs to one name."""
    out: str = Field(min_length=1)
    """Where the output is written: a folder, or `s3://bucket/prefix`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the hold-out, the folds, the sketches, the order and the samples."""
    corpus: CorpusSettings
    teacher: TeacherSettings
    target: SketchSettings = ThresholdSketch()
    cluster: ClusterSettings = ClusterSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _suitable_targets(self) -> Job:
        if (problem := self.train.problem_with(self.target)) is not None:
            raise problem
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> Job:
        shown, room = self.evaluate.prompt_tokens + self.evaluate.sample_tokens, self.corpus.context_tokens
        if shown > room:
            raise KeyInvalid(
                "evaluate.sample_tokens",
                f"with prompt_tokens makes {shown}, more than context_tokens ({room}): human text would be cut shorter;"
                " lower it, or raise `corpus.context_tokens`",
            )
        return self

    @field_validator("out")
    @classmethod
    def _plain_path(cls, value: str) -> str:
        return output_uri(value)
