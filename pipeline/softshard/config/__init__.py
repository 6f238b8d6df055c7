"""The settings of a job: frozen models that check every value, and the values of different sections together.

`config.job_file` reads them from a YAML file, and its errors name the line and the key. The stages pass plain typed
values from here to the core.
"""

from __future__ import annotations

from softshard.config.adapter import AdapterKind, DataType, LoraSettings, OptimizerSettings
from softshard.config.cluster import AdaptiveSettings, ClusterSettings
from softshard.config.corpus import CorpusSettings, Duplicates, SourceSettings
from softshard.config.data import (
    BalanceSettings,
    LabelWeightSettings,
    MoreTargetsSettings,
    WeightOverSteps,
    WhereSettings,
    weight_at,
)
from softshard.config.job import EvaluateSettings, Job
from softshard.config.sketch import (
    SKETCH_KINDS,
    FullSketch,
    NucleusSketch,
    SketchClass,
    SketchSettings,
    ThresholdSketch,
    TopkSketch,
    parse_sketch,
    sketch_class,
)
from softshard.config.teacher import TeacherSettings, VllmSettings
from softshard.config.train import BaselineSettings, RetentionSettings, SweepSettings, TrainSettings

__all__ = [
    "SKETCH_KINDS",
    "AdapterKind",
    "AdaptiveSettings",
    "BalanceSettings",
    "BaselineSettings",
    "ClusterSettings",
    "CorpusSettings",
    "DataType",
    "Duplicates",
    "EvaluateSettings",
    "FullSketch",
    "Job",
    "LabelWeightSettings",
    "LoraSettings",
    "MoreTargetsSettings",
    "NucleusSketch",
    "OptimizerSettings",
    "RetentionSettings",
    "SketchClass",
    "SketchSettings",
    "SourceSettings",
    "SweepSettings",
    "TeacherSettings",
    "ThresholdSketch",
    "TopkSketch",
    "TrainSettings",
    "VllmSettings",
    "WeightOverSteps",
    "WhereSettings",
    "parse_sketch",
    "sketch_class",
    "weight_at",
]
