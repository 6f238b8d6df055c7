"""How much time and device memory does capture add to a teacher's forward pass on a GPU?

SmolLM2-135M and, if its files are in the cache, Qwen2.5-Coder-0.5B, in bfloat16 on real prose; the transformers engine
and, if installed, vLLM's, in this process. Both passes of an engine use the same sequences and settings and alternate:

- bare: the logits of every position, computed in chunks and discarded;
- capture: the sketch of every position at tau = 1/24, encoded and committed as Parquet.

`ENGINE_overhead` is the median over rounds of the ratio of both times, `ENGINE_added_mib` the difference of the peaks
of torch.cuda.max_memory_allocated, `ENGINE_tokens_per_second` the argument of `softshard plan --tokens-per-second`.
`sketch_over_log_softmax_N` is the time to sketch N rows of logits over that of torch.log_softmax of the same rows into
a preallocated float32 tensor: N is 128 for vLLM's chunk, 256 for the transformers engine's, 1,024 for a large one.

Without a CUDA device it exits with 2. `--device cpu` rehearses the script; its figures then say nothing about a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import ModelName, Options, Positions, Result, positions, require, say, say_table
from softshard.config import TeacherSettings, ThresholdSketch, VllmSettings
from softshard.errors import JobInvalid
from softshard.models import load_model
from softshard.models.decoder import Decoder, batches_by_length
from softshard.shard.commit import PartSpec, build_part, commit_part
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import SequenceTargets
from softshard.storage import LocalStore
from softshard.teacher.engines import open_teacher, teacher_identity
from softshard.teacher.protocol import Teacher

_SKETCH = ThresholdSketch(tau=1 / 24)
_FOLDERS: dict[ModelName, str] = {"small": "SmolLM2-135M-Instruct", "large": "Qwen2.5-Coder-0.5B-Instruct"}
_CONTEXT_TOKENS = 512
_ROWS_OF_LOGITS = 256
_BATCH_TOKENS = 16_384
_BFLOAT16_NATS = 0.1
"""Most of the mean difference between label log-probabilities in bfloat16 and in float32; vLLM's on a CPU was .027."""
_ROWS_TIMED = (128, 256, 1_024)
_BATCHES = 4

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """What is measured on what."""

    model: ModelName
    source: Positions
    folder: Path
    device: str
    num_rounds: int

    def settings(self, engine: EngineName) -> TeacherSettings:
        # Left to itself vLLM fills the memory with its cache, and its peak would say nothing of capture.
        vllm = VllmSettings(kv_cache_gib=1, gpu_memory_utilization=0.5)
        return TeacherSettings(
            model=str(self.folder),
            engine=engine,
            device=self.device,
            dtype="bfloat16",
            batch_tokens=_BATCH_TOKENS,
            folds=0,
            vllm=vllm,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    seconds: float
    peak_mib: float
    """Of the device; 0 where torch does not count it."""


def _timed(way: Callable[[LocalStore], object], device: str) -> _Pass:
    with tempfile.TemporaryDirectory() as folder:
        _wait_for(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        way(LocalStore(folder))
        _wait_for(device)
        seconds = time.perf_counter() - began
    return _Pass(seconds=seconds, peak_mib=torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _bare(bench: _Bench, engine: EngineName, teacher: Teacher) -> Callable[[LocalStore], object]:
    if engine == "vllm":
        return lambda _: teacher.score_each(bench.source.sequences, sketches=(), seed=0)
    sequences = bench.source.sequences
    decoder = Decoder.of(load_model(bench.folder, dtype=torch.bfloat16, device=bench.device))

    @torch.inference_mode()
    def bare(_: LocalStore) -> None:
        for batch in batches_by_length(sequences, batch_tokens=_BATCH_TOKENS):
            states = decoder.hidden_states([sequences[index] for index in batch])
            for rows in torch.split(states, _ROWS_OF_LOGITS):
                decoder.logits(rows)

    return bare


def _capture(bench: _Bench, teacher: Teacher) -> Callable[[LocalStore], list[SequenceTargets]]:
    plan = PartSpec(
        index=0,
        split="train",
        fold=-1,
        slice="",
        tokenizer_fingerprint="",
        vocab_size=bench.source.vocab_size,
        teacher=teacher.identity,
        sketch=_SKETCH,
        seed=0,
    )

    def capture(store: LocalStore) -> list[SequenceTargets]:
        targets, sums = teacher.score(bench.source.sequences, sketch=_SKETCH, seed=0)
        commit_part(store, *build_part(plan, list(zip(bench.source.sequences, targets, strict=True)), sums))
        return targets

    return capture


def _rounds(bench: _Bench, engine: EngineName) -> list[dict[str, _Pass]]:
    identity = teacher_identity(bench.settings(engine), context_tokens=_CONTEXT_TOKENS, weights="", adapters=[])
    teacher = open_teacher(
        bench.folder, adapters=(), identity=identity, device=bench.device, vocab_size=bench.source.vocab_size
    )
    ways = {"bare": _bare(bench, engine, teacher), "capture": _capture(bench, teacher)}
    with tempfile.TemporaryDirectory() as folder:
        targets = _capture(bench, teacher)(LocalStore(folder))
        file = next(Path(folder).rglob("*.parquet"))
        say(f"{engine}: {file.stat().st_size / len(bench.source.states):.1f} bytes per position")
    _check_labels(bench, engine, targets)
    _timed(ways["bare"], bench.device)
    rounds = []
    for number in range(bench.num_rounds):
        order = ("bare", "capture") if number % 2 == 0 else ("capture", "bare")
        rounds.append({name: _timed(ways[name], bench.device) for name in order})
    teacher.close()
    return rounds


def _check_labels(bench: _Bench, engine: EngineName, targets: list[SequenceTargets]) -> None:
    source, expected = bench.source, []
    for start in range(0, len(source.states), _ROWS_OF_LOGITS):
        rows = torch.log_softmax(source.logits(start, start + _ROWS_OF_LOGITS), 1)
        expected.append(rows.gather(1, source.labels[start : start + len(rows), None])[:, 0].numpy())
    found = np.concatenate([one.label_logprob for one in targets])
    apart = float(np.abs(found - np.concatenate(expected)).mean())
    claim = f"{engine}: labels are {apart:.3f} nats from a float32 pass on the CPU, in the mean"
    require(apart <= _BFLOAT16_NATS, claim)


def _engine_figures(rounds: list[dict[str, _Pass]], num_tokens: int, device: str) -> dict[str, float]:
    figures = {
        "overhead": statistics.median(one["capture"].seconds / one["bare"].seconds for one in rounds),
        "tokens_per_second": num_tokens / statistics.median(one["capture"].seconds for one in rounds),
        "bare_tokens_per_second": num_tokens / statistics.median(one["bare"].seconds for one in rounds),
    }
    if device == "cuda":
        peaks = {name: max(one[name].peak_mib for one in rounds) for name in ("bare", "capture")}
        figures |= {"peak_mib": peaks["capture"], "added_mib": peaks["capture"] - peaks["bare"]}
    return figures


def _sketching(bench: _Bench, num_rows: int) -> Callable[[Tensor], SequenceTargets]:
    source = bench.source
    noise = np.ascontiguousarray(source.uniforms(seed=0, num_draws=1)[:, :num_rows])
    labels, places = source.labels[:num_rows].to(bench.device), source.places[:num_rows]

    def sketch(logits: Tensor) -> SequenceTargets:
        size = source.vocab_size
        return sketch_rows(logits, labels=labels, uniforms=noise, settings=_SKETCH, vocab_size=size, places=places)[0]

    return sketch


def _sketch_figures(bench: _Bench, num_rows: int) -> dict[str, float]:
    """Each call sees another batch than those before it, so that nobody finds its logits in a cache."""
    source, sketch = bench.source, _sketching(bench, num_rows)
    logits = source.logits(0, num_rows).bfloat16()
    batches = itertools.cycle([logits.to(bench.device, copy=True) for _ in range(_BATCHES)])
    out = torch.empty(logits.shape, dtype=torch.float32, device=bench.device)
    exact = torch.log_softmax(logits.double(), 1).gather(1, source.labels[:num_rows, None])[:, 0].numpy()
    apart = float(np.abs(sketch(next(batches)).label_logprob - exact).max())
    require(apart <= 3e-5, f"{num_rows} rows: label log-probabilities are within {apart:.0e} of float64")
    torch.log_softmax(next(batches), 1, dtype=torch.float32, out=out)
    taken: list[tuple[float, float]] = []
    for _ in range(4 * bench.num_rounds):
        sketched = _timed(lambda _: sketch(next(batches)), bench.device)
        softmax = _timed(lambda _: torch.log_softmax(next(batches), 1, dtype=torch.float32, out=out), bench.device)
        taken.append((sketched.seconds, softmax.seconds))
    return {
        f"sketch_over_log_softmax_{num_rows}": statistics.median(ours / theirs for ours, theirs in taken),
        f"sketch_us_per_row_{num_rows}": statistics.median(ours for ours, _ in taken) / num_rows * 1e6,
    }


def _measure_model(bench: _Bench) -> dict[str, float]:
    num_tokens = sum(len(sequence.token_ids) for sequence in bench.source.sequences)
    engines: list[EngineName] = ["transformers", "vllm"] if find_spec("vllm") is not None else ["transformers"]
    figures: dict[str, float] = {}
    for engine in engines:
        found = _engine_figures(_rounds(bench, engine), num_tokens, bench.device)
        figures |= {f"{engine}_{name}": value for name, value in found.items()}
    for num_rows in _ROWS_TIMED:
        figures |= _sketch_figures(bench, num_rows)
    say(f"{_FOLDERS[bench.model]}, V = {bench.source.vocab_size:,}, {num_tokens:,} tokens, {bench.num_rounds} rounds")
    say_table(("", "median"), [(name, f"{value:,.3f}") for name, value in figures.items()])
    return figures


def _benches(options: Options, device: str) -> list[_Bench]:
    """Of the models that are there."""

    def bench(model: ModelName, num_positions: int) -> _Bench:
        source = positions(model, num_positions=num_positions, cache=options.cache)
        folder, num_rounds = options.cache / _FOLDERS[model], 3 if options.quick else 15
        return _Bench(model=model, source=source, folder=folder, device=device, num_rounds=num_rounds)

    benches = [bench("small", 2_000 if options.quick else 24_000)]
    if not options.quick:
        try:
            benches.append(bench("large", 8_000))
        except JobInvalid as error:
            say(f"the larger vocabulary is left out: {error}")
    return benches


def measure(options: Options) -> Result:
    device = str(options.device)
    details: dict[str, Any] = {"device": device}
    if device == "cuda":
        if not torch.cuda.is_available():
            problem = "no CUDA device is visible to torch; `--device cpu` rehearses the script"
            raise JobInvalid(file="--device cuda", place="", problem=problem)
        about = torch.cuda.get_device_properties(0)
        details = {"device": about.name, "device_gib": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    found = {bench.model: _measure_model(bench) for bench in _benches(options, device)}
    figures = {
        f"{'' if model == 'small' else f'{model}_'}{name}": float(f"{value:.4g}")
        for model, one in found.items()
        for name, value in one.items()
    }
    return Result(figures=figures, details=details)
