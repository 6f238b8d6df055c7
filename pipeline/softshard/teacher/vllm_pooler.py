"""The part of the vLLM engine that runs in vLLM's processes: any decoder of vLLM as a pooling model that sketches.

In: hidden states of a batch, as vLLM schedules it. Out: for each complete sequence, its chain of records as in
`vllm_wire`. Only rows before a label are projected, and they are sketched as they arrive, so that no hidden state of a
sequence that vLLM takes in pieces is kept. Random numbers are keyed by (seed, sequence id, label, draw), so neither
pieces nor batches nor retries change them.

Only vLLM's own processes import this module; vLLM finds it by the entry point group `vllm.general_plugins`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models import ModelRegistry, interfaces, interfaces_base
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from softshard.config import FullSketch, SketchSettings, ThresholdSketch
from softshard.errors import ArchitectureUnsupported, LogitsInvalid
from softshard.sketch.philox import draw_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import TokenSequence
from softshard.teacher.vllm_wire import pack_invalid, pack_targets

__all__ = ["EXTRA", "OWNER", "PREFIX", "SketchPooler", "make_request", "make_teacher", "register", "teacher_class"]

PREFIX = "Softshard"
"""A teacher of architecture X is registered as SoftshardX."""
EXTRA = "softshard"
"""Key of this module's arguments: of the engine in `additional_config`, of a request in `extra_kwargs`."""

OWNER = "SOFTSHARD_ENGINE_OWNER"
"""Environment variable with the id of the process that opened the engine. It is no part of vLLM's configuration, by
which vLLM caches its compiled code."""

_DECORATE = "_decorate_for_torch_compile"
_SETTINGS: TypeAdapter[list[SketchSettings]] = TypeAdapter(list[SketchSettings])


def register() -> None:
    """The entry point: register a teacher for every architecture of vLLM; its class is made on first use."""
    for architecture in sorted(ModelRegistry.get_supported_archs()):
        if not architecture.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + architecture, f"{__name__}:{PREFIX}{architecture}")
            if architecture in MODELS_CONFIG_MAP:
                MODELS_CONFIG_MAP[PREFIX + architecture] = MODELS_CONFIG_MAP[architecture]


def make_teacher(architecture: str, *, compiled_here: bool) -> str:
    """Name of an architecture's teacher, registered as a class, so that vLLM starts no process to inspect it.

    Args:
        architecture: name of the model's class, from its config.
        compiled_here: vLLM will compile the model in this process.

    Raises:
        ArchitectureUnsupported: the architecture cannot be a teacher; the error gives the reason.
    """
    register()
    made = teacher_class(architecture)
    if compiled_here and hasattr(made, _DECORATE):
        reason = (
            "vLLM runs it through the class of transformers, which compiling would change for the whole worker;"
            " set `enforce_eager: true` or `own_process: true` in teacher.vllm"
        )
        raise ArchitectureUnsupported(architecture=architecture, reason=reason)
    ModelRegistry.register_model(PREFIX + architecture, made)
    return str(made.__name__)


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    return teacher_class(name.removeprefix(PREFIX))


@lru_cache(maxsize=32)
def teacher_class(architecture: str) -> Any:
    """The pooling model of an architecture: a subclass of vLLM's class with a `SketchPooler`.

    Raises:
        ArchitectureUnsupported: the architecture cannot be a teacher; the error gives the reason.
    """
    base = _decoder_class(architecture)
    own: dict[str, Any] = {"__module__": __name__, "is_pooling_model": True}
    if hasattr(base, _DECORATE):
        own[_DECORATE] = _decorate_only_for_compilation

    def build(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        settings = get_current_vllm_config().additional_config[EXTRA]
        _exit_with_owner(int(os.environ[OWNER]))
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.pooler = SketchPooler(self.compute_logits, **settings)

    return type(PREFIX + architecture, (base,), {**own, "__init__": build})


def _exit_with_owner(owner: int) -> None:
    """Exit this process of vLLM when the process that opened the engine has ended, and do not wait forever."""

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(owner).wait()
        os._exit(1)

    if owner != os.getpid():
        threading.Thread(target=watch, name="softshard-owner-watch", daemon=True).start()


def _decorate_only_for_compilation(model: Any) -> None:
    """Overrides vLLM's preparation of a transformers class for compilation, and does it only where vLLM compiles.

    vLLM runs some architectures through transformers' own class, and this preparation changes the class so that it can
    no longer be instantiated without vLLM: a worker that later trains or scores with transformers would fail.
    """
    if not get_current_vllm_config().model_config.enforce_eager:
        getattr(super(type(model), model), _DECORATE)()


def _decoder_class(architecture: str) -> Any:
    def refuse(reason: str) -> ArchitectureUnsupported:
        return ArchitectureUnsupported(architecture=architecture, reason=reason)

    if architecture.endswith("Model") and not architecture.endswith(("LMHeadModel", "ChatGLMModel")):
        raise refuse("the name is that of a body without an output layer, which gives no distribution of a next token")
    registered = ModelRegistry.models.get(architecture)
    if registered is None:
        raise refuse("this version of vLLM has no model of that name")
    try:
        model = registered.load_model_cls()
    except ImportError as error:
        raise refuse(f"vLLM's model of that name cannot be imported here ({error})") from error
    if interfaces.supports_multimodal(model):
        raise refuse("vLLM's model of that name takes more than text")
    if not interfaces_base.is_text_generation_model(model) or interfaces_base.is_pooling_model(model):
        raise refuse("it has no compute_logits, so it gives no distribution of a next token")
    if interfaces.has_inner_state(model) or interfaces.is_attention_free(model) or interfaces.is_hybrid(model):
        raise refuse("it carries a state from token to token, and vLLM's pooling of such models is not proven")
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One sequence to sketch."""

    sequence_id: str
    label_spans: Sequence[tuple[int, int]]
    """As a `TokenSequence` has them."""
    seed: int
    settings: str
    """JSON list of sketch settings."""


def make_request(sequence: TokenSequence, *, seed: int, settings: list[SketchSettings]) -> dict[str, Any]:
    """`PoolingParams.extra_kwargs` of a sequence, in types that survive the way to another process."""
    text = _SETTINGS.dump_json(settings).decode()
    spans = [list(span) for span in sequence.label_spans]
    return {EXTRA: {"sequence_id": sequence.sequence_id, "label_spans": spans, "seed": seed, "settings": text}}


@lru_cache(maxsize=64)
def _parse_settings(text: str) -> list[SketchSettings]:
    return _SETTINGS.validate_json(text)


class SketchPooler(Pooler):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Turns rows of hidden states into records of targets, `chunk_rows` rows of logits at a time.

    Args:
        compute_logits: maps [n, d] hidden states to [n, at least vocab_size] logits, or to None where another rank of
            a tensor-parallel engine has them.
        chunk_rows: most rows of logits that exist at one time.
        vocab_size: tokens of the vocabulary; logits beyond them are padding.
    """

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None], *, chunk_rows: int, vocab_size: int) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._chunk_rows, self._vocab_size = chunk_rows, vocab_size

    def get_supported_tasks(self) -> set[str]:
        """The task whose output vLLM passes on unchanged."""
        return {"token_classify"}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        """Request the token ids: the label of the last row of a piece is the first token of the next."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """For each request of a batch, its chain of records, or None where its prompt continues in another batch.

        A request without sketch settings is a bare forward pass: the logits of every label's row, and an empty chain.
        vLLM's memory profile has no requests of softshard; a rehearsal at full chunk size stands in for them.
        """
        params = pooling_metadata.pooling_params
        if any(EXTRA not in (param.extra_kwargs or {}) for param in params):
            self._rehearse(hidden_states)
            return [torch.zeros(0, dtype=torch.int32) for _ in params]
        cursor = pooling_metadata.get_pooling_cursor()
        counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        all_ids, states = pooling_metadata.get_prompt_token_ids_cpu(), pooling_metadata.pooling_states
        outputs: list[Tensor | None] = []
        for rows, end, ids, param, state in zip(
            torch.split(hidden_states, counts), ends, all_ids, params, states, strict=True
        ):
            start, records = end - len(rows), state.hidden_states_cache
            if start == 0:
                records.clear()  # A request that was preempted starts again.
            records.extend(self._sketch(rows, ids, start=start, request=_Request(**param.extra_kwargs[EXTRA])))
            if end < len(ids):
                outputs.append(None)
            else:
                outputs.append(torch.cat(records) if records else torch.zeros(0, dtype=torch.int32))
                state.clean()
        return outputs

    def _sketch(self, states: Tensor, ids: Tensor, *, start: int, request: _Request) -> Iterator[Tensor]:
        """Records of the rows whose next token is a label; `start` is the position of the first row."""
        spans = [(max(first - 1, start), min(stop - 1, start + len(states))) for first, stop in request.label_spans]
        positions = torch.cat([torch.arange(first, max(first, stop)) for first, stop in spans])
        for chunk in torch.split(positions, self._chunk_rows) if len(positions) else ():
            # Every rank of a tensor-parallel engine must take part in this.
            logits = self._compute_logits(states[(chunk - start).to(states.device)])
            if logits is not None and get_tensor_model_parallel_rank() == 0:
                yield from self._records(logits, ids[chunk + 1], positions=chunk, request=request)

    def _records(self, logits: Tensor, labels: Tensor, *, positions: Tensor, request: _Request) -> Iterator[Tensor]:
        labels = labels.to(device=logits.device, dtype=torch.int64)
        places = [(request.sequence_id, position) for position in positions.tolist()]
        for number, settings in enumerate(_parse_settings(request.settings)):
            uniforms = draw_uniforms(
                positions.numpy() + 1,
                seed=request.seed,
                sequence_id=request.sequence_id,
                draws=settings.num_draws,
            )
            try:
                targets, sums = sketch_rows(
                    logits,
                    labels=labels,
                    uniforms=uniforms,
                    settings=settings,
                    vocab_size=self._vocab_size,
                    places=places,
                    temperature=settings.temperature,
                )
            except LogitsInvalid as error:
                # An exception here would end the engine; a record reaches `VllmTeacher`, which raises it.
                yield pack_invalid(position=error.position, value=error.value, setting=number)
                return
            yield pack_targets(targets, sums, setting=number)

    def _rehearse(self, hidden_states: Tensor) -> None:
        """Use as much memory as the largest chunk does: all its rows at once, with the kind that stores every token."""
        rows = hidden_states[: self._chunk_rows]
        request = _Request(
            sequence_id="",
            label_spans=((1, len(rows) + 1),),
            seed=0,
            settings=_SETTINGS.dump_json([ThresholdSketch(), FullSketch(kind="full")]).decode(),
        )
        for _ in self._sketch(rows, torch.zeros(len(rows) + 1, dtype=torch.int64), start=0, request=request):
            pass
