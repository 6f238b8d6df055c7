"""The engines by name: identified before they are loaded, refused where a worker has another, opened.

Their names are those of `EngineName` in config, and each is one module that provides an `Engine`. A part's id depends
on its engine's identity. The hold-out of a style teacher in folds is scored with the mean of all adapters'
distributions, position by position. An engine that cannot average them, such as vLLM, which serves one set of merged
weights at a time, leaves the hold-out to the transformers engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from softshard.config import DataType, TeacherSettings
from softshard.errors import EngineDiffers
from softshard.teacher.protocol import Engine, Teacher, TeacherIdentity

__all__ = [
    "check_engine",
    "find_engine",
    "open_teacher",
    "refuse_other_engine",
    "run_teacher_identity",
    "teacher_identity",
]

_AVERAGING = "transformers"
"""Engine that scores with the mean of several adapters where the job's engine cannot."""


def find_engine(name: str) -> Engine:
    """The engine of a name in `EngineName`. What it needs beyond softshard itself is not imported."""
    return cast("Engine", import_module(f"softshard.teacher.{name}_engine"))


def check_engine(settings: TeacherSettings) -> None:
    """Refuse an engine that is not installed. Raises EngineMissing."""
    find_engine(settings.engine).process_identity(settings.device, settings.dtype)


def teacher_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """Identity of the engine that scores with these adapters: none, one, or several that are averaged.

    Args:
        settings: the job's.
        context_tokens: most tokens of a sequence.
        weights: digest of the model.
        adapters: digests.

    Raises:
        EngineMissing: the engine is not installed.
    """
    engine = find_engine(settings.engine)
    if len(adapters) > 1 and not engine.AVERAGES_ADAPTERS:
        engine = find_engine(_AVERAGING)
    return engine.engine_identity(settings, context_tokens=context_tokens, weights=weights, adapters=adapters)


def run_teacher_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """Identity for the manifest: of the job's engine, and of the one that scored the hold-out where they differ.

    The latter's values have the prefix `holdout_` and are given where they are not those of the job's engine.
    """
    identity = find_engine(settings.engine).engine_identity(
        settings, context_tokens=context_tokens, weights=weights, adapters=adapters
    )
    holdout = teacher_identity(settings, context_tokens=context_tokens, weights=weights, adapters=adapters)
    return identity | {f"holdout_{name}": value for name, value in holdout.items() if identity.get(name) != value}


def refuse_other_engine(expected: TeacherIdentity, *, device: str) -> None:
    """Refuse to score in a process whose engine is not the one that the parts' ids were made with.

    Raises:
        EngineDiffers: this process has another version or kind of device.
        EngineMissing: the engine is not installed in this process.
    """
    dtype = cast("DataType", expected["dtype"])
    here = find_engine(str(expected["engine"])).process_identity(device, dtype)
    for what, actual in here.items():
        if actual != expected[what]:
            raise EngineDiffers(what=what, expected=str(expected[what]), actual=actual)


def open_teacher(
    folder: Path, *, adapters: Sequence[Path], identity: TeacherIdentity, device: str, vocab_size: int
) -> Teacher:
    """The engine that an identity names, ready to score.

    Raises:
        EngineDiffers: this process has another version or kind of device.
        ModelInvalid: the engine cannot load the model.
        ArchitectureUnsupported: vLLM cannot score with a model of this architecture.
        AdapterNotApplied: vLLM does not give the adapted model's distributions.
    """
    refuse_other_engine(identity, device=device)
    engine = find_engine(str(identity["engine"]))
    return engine.open_engine(folder, adapters=adapters, identity=identity, device=device, vocab_size=vocab_size)
