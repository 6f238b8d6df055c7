"""Which engine scores what: named before it is loaded, refused where it is another, opened.

A part's id goes by its engine's identity. With `engine: vllm` the hold-out of a style teacher in folds is scored by the
transformers engine: its target is the mean of all adapters' distributions, position by position, and vLLM serves one
set of merged weights at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from softshard.config import DataType, TeacherSettings
from softshard.errors import EngineDiffers
from softshard.teacher import transformers_engine, vllm_engine
from softshard.teacher.protocol import Teacher, TeacherIdentity

__all__ = ["open_teacher", "refuse_other_engine", "run_teacher_identity", "teacher_identity"]

_PROCESS = {"transformers": transformers_engine.process_identity, "vllm": vllm_engine.process_identity}


def teacher_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """Identity of the engine that scores with so many adapters, one or several that are averaged.

    Args:
        settings: the job's.
        context_tokens: most tokens of a sequence.
        weights: digest of the model.
        adapters: digests.

    Raises:
        EngineMissing: the engine is not installed.
    """
    if settings.engine == "vllm" and len(adapters) <= 1:
        return vllm_engine.vllm_identity(settings, context_tokens=context_tokens, weights=weights, adapters=adapters)
    return transformers_engine.engine_identity(settings, weights=weights, adapters=adapters)


def run_teacher_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """Identity for the manifest: of the job's engine, and where another scored the hold-out, of that as `holdout_*`."""
    if settings.engine == "transformers":
        return transformers_engine.engine_identity(settings, weights=weights, adapters=adapters)
    identity = vllm_engine.vllm_identity(settings, context_tokens=context_tokens, weights=weights, adapters=adapters)
    if len(adapters) > 1:
        other = transformers_engine.engine_identity(settings, weights=weights, adapters=adapters)
        identity |= {f"holdout_{name}": value for name, value in other.items() if identity.get(name) != value}
    return identity


def refuse_other_engine(expected: TeacherIdentity, *, device: str) -> None:
    """Refuse to score with another engine than the one that the part is named by.

    Raises:
        EngineDiffers: this process has another version or kind of device.
        EngineMissing: it does not have the engine at all.
    """
    here = _PROCESS[str(expected["engine"])](device, cast("DataType", expected["dtype"]))
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
        ArchitectureUnsupported: vLLM cannot make a teacher of it.
        AdapterNotApplied: vLLM does not give the adapted model's distributions.
    """
    refuse_other_engine(identity, device=device)
    if identity["engine"] == "vllm":
        return vllm_engine.VllmTeacher(folder, adapters=adapters, identity=identity, vocab_size=vocab_size)
    return transformers_engine.TransformersTeacher(
        folder, adapters=adapters, identity=identity, device=device, vocab_size=vocab_size
    )
