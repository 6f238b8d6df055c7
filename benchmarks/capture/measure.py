"""What does capturing targets cost beside the forward pass, and beside vLLM's `prompt_logprobs`?

SmolLM2-135M in float32 on real prose, one thread per process, the same sequences and engine settings for all. All ways
alternate in one run; figures are medians over rounds of the ratio of two times.

- bare: the logits of every position, computed in chunks and discarded; for the transformers engine in its own batches,
  for vLLM in the pooling engine that also captures;
- capture: the sketch of every position at tau = 1/24, encoded and committed as Parquet;
- prompt_logprobs=K, as dictionaries and as flat lists: vLLM without changes, written to the same columns as top-K
  targets.

`X_overhead` is the time of X over that of the bare pass: the transformers engine's own, and vLLM's for all others.
`several_` is the same with vLLM's model in a separate process, as is vLLM's default, and for the transformers engine
with two processes side by side, of which the slower one counts. `added_share` is the time that capture adds to the bare
pass, over the time that prompt_logprobs=128 (dict) adds. Peaks are of resident memory, weights and the cache's touched
pages included, of all processes of an engine.

It needs vLLM: run it with `.venv-vllm/bin/python`, which `make test-vllm` creates.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.capture.engine_process import SKETCH, EngineName, Pass, PassProcess, Setup, started
from benchmarks.harness import Options, Positions, Result, positions, require, say, say_table
from softshard.errors import EngineMissing
from softshard.shard.read import read_row_group
from softshard.sketch.types import SequenceTargets

_MODEL = "SmolLM2-135M-Instruct"
_LOGPROBS = ("dict-20", "flat-20", "dict-128", "flat-128")
_GRID = 1 / 16
_ENGINE_NOISE = 1e-3
Key = tuple[str, str]
"""Process and way."""


def _setups(source: Positions, folder: Path, *, quick: bool) -> dict[str, Setup]:
    def setup(engine: EngineName, *, own_process: bool = False) -> Setup:
        return Setup(
            engine=engine,
            model=folder,
            sequences=source.sequences,
            vocab_size=source.vocab_size,
            own_process=own_process,
        )

    one = {"transformers": setup("transformers"), "vllm": setup("vllm"), "vllm-text": setup("vllm-text")}
    if quick:
        return one
    return one | {
        "second transformers": setup("transformers"),
        "several vllm": setup("vllm", own_process=True),
        "several vllm-text": setup("vllm-text", own_process=True),
    }


def _ways(setups: Mapping[str, Setup], *, quick: bool) -> list[Key]:
    keys = []
    for name, setup in setups.items():
        if name == "second transformers":
            keys += [("several transformers", "bare"), ("several transformers", "capture")]
        elif setup.engine == "vllm-text":
            keys += [(name, way) for way in _LOGPROBS if not quick or way.startswith("dict")]
        else:
            keys += [(name, "bare"), (name, "capture")]
    return keys


def _run(processes: Mapping[str, PassProcess], key: Key) -> Pass:
    name, way = key
    if name != "several transformers":
        return processes[name].run(way)
    both = [processes["transformers"], processes["second transformers"]]
    for process in both:
        process.start(way)
    first, second = (process.result() for process in both)
    return Pass(seconds=max(first.seconds, second.seconds), peak_mib=first.peak_mib + second.peak_mib, part=first.part)


def _check(source: Positions, parts: Mapping[Key, bytes]) -> None:
    """What each way left, against float64 softmax of a direct forward pass."""
    target = torch.log_softmax(source.logits(0, len(source.states)).double(), 1).numpy()
    labels = target[np.arange(len(target)), source.labels.numpy()]
    for (name, way), content in parts.items():
        column = polars.read_parquet(content).get_column("label_logprob").explode().to_numpy()
        apart = float(np.abs(column - labels).max())
        within = len(column) == len(labels) and apart <= _GRID / 2 + _ENGINE_NOISE
        require(within, f"{name}, {way}: labels as polars reads them are within {apart:.3f} nats")
        same = _heads_as_expected(target, content, None if way == "capture" else int(way.partition("-")[2]))
        require(same >= 0.999, f"{name}, {way}: {same:.5f} of the entries are those of float64")


def _heads_as_expected(target: NDArray[np.float64], content: bytes, num: int | None) -> float:
    """Share of a part's head entries that are the tokens of at least tau, or the `num` most likely ones."""
    kept, right, at = 0, 0, 0
    for targets in _targets_of(content):
        ends = np.cumsum(targets.head_count)
        for first, last in zip(ends - targets.head_count, ends, strict=True):
            row = target[at]
            expected = np.flatnonzero(row >= np.log(SKETCH.tau)) if num is None else np.argpartition(-row, num)[:num]
            right += len(np.intersect1d(expected, targets.head_ids[first:last]))
            kept += max(len(expected), int(last - first))
            at += 1
    return right / kept


def _targets_of(content: bytes) -> list[SequenceTargets]:
    groups = pq.ParquetFile(io.BytesIO(content)).num_row_groups
    rows = [row for group in range(groups) for row in read_row_group(content, group, uri="part")[0]]
    return [targets for _, targets in rows]


def _overheads(rounds: Sequence[Mapping[Key, Pass]]) -> dict[Key, float]:
    """Median over the rounds of the time of each way over that of the bare pass it belongs to."""
    found = {}
    for key in rounds[0]:
        name = key[0].removesuffix("-text")
        found[key] = statistics.median(one[key].seconds / one[name, "bare"].seconds for one in rounds)
    return found


def _figures(rounds: Sequence[Mapping[Key, Pass]]) -> dict[str, float]:
    over = _overheads(rounds)
    peak = {key: max(one[key].peak_mib for one in rounds) for key in rounds[0]}
    figures: dict[str, float] = {}
    for prefix in ("", "several "):
        names = {
            f"{prefix}transformers_overhead": (f"{prefix}transformers", "capture"),
            f"{prefix}vllm_overhead": (f"{prefix}vllm", "capture"),
            f"{prefix}prompt_logprobs_20_overhead": (f"{prefix}vllm-text", "dict-20"),
            f"{prefix}prompt_logprobs_128_overhead": (f"{prefix}vllm-text", "dict-128"),
            f"{prefix}prompt_logprobs_20_flat_overhead": (f"{prefix}vllm-text", "flat-20"),
            f"{prefix}prompt_logprobs_128_flat_overhead": (f"{prefix}vllm-text", "flat-128"),
        }
        figures |= {name: over[key] for name, key in names.items() if key in over}
        if (f"{prefix}vllm", "capture") in over:
            added = [over[f"{prefix}{name}", way] - 1 for name, way in (("vllm", "capture"), ("vllm-text", "dict-128"))]
            figures[f"{prefix}added_share"] = added[0] / added[1]
            figures[f"{prefix}vllm_peak_mib"] = peak[f"{prefix}vllm", "capture"]
            figures[f"{prefix}vllm_bare_peak_mib"] = peak[f"{prefix}vllm", "bare"]
            figures[f"{prefix}prompt_logprobs_128_peak_mib"] = peak[f"{prefix}vllm-text", "dict-128"]
        if (f"{prefix}transformers", "capture") in over:
            figures[f"{prefix}transformers_peak_mib"] = peak[f"{prefix}transformers", "capture"]
    return {name.replace(" ", "_"): float(f"{value:.4g}") for name, value in figures.items()}


def _say_rounds(rounds: Sequence[Mapping[Key, Pass]], num_labels: int) -> None:
    over = _overheads(rounds)
    seconds = {key: statistics.median(one[key].seconds for one in rounds) for key in over}
    say(f"{_MODEL}, {num_labels:,} positions, {len(rounds)} rounds; seconds and ratios are medians")
    say_table(
        ("processes and way", "seconds", "over bare", "peak MiB", "part bytes"),
        [
            (
                f"{name}, {way}",
                f"{seconds[name, way]:.2f}",
                f"{over[name, way]:.3f}",
                f"{max(one[name, way].peak_mib for one in rounds):,.0f}",
                f"{len(rounds[0][name, way].part):,}",
            )
            for name, way in over
        ],
    )


def measure(options: Options) -> Result:
    if find_spec("vllm") is None:
        raise EngineMissing(engine="vllm")
    num_rounds = 2 if options.quick else 7
    source = positions("small", num_positions=500 if options.quick else 3_600, cache=options.cache)
    setups = _setups(source, options.cache / _MODEL, quick=options.quick)
    keys = _ways(setups, quick=options.quick)
    rounds: list[dict[Key, Pass]] = []
    with started(setups) as processes:
        warm = {key: _run(processes, key) for key in keys}
        _check(source, {key: one.part for key, one in warm.items() if key[1] != "bare"})
        for number in range(num_rounds):
            order = keys if number % 2 == 0 else keys[::-1]
            found = {key: _run(processes, key) for key in order}
            rounds.append({key: found[key] for key in keys})
    _say_rounds(rounds, len(source.states))
    details = {
        "model": _MODEL,
        "positions": len(source.states),
        "sequences": len(source.sequences),
        "threads_of_a_process": 1,
        "seconds": {f"{name}, {way}": [one[name, way].seconds for one in rounds] for name, way in keys},
        "peak_mib": {f"{name}, {way}": max(one[name, way].peak_mib for one in rounds) for name, way in keys},
        "part_bytes": {f"{name}, {way}": len(rounds[0][name, way].part) for name, way in keys},
    }
    return Result(figures=_figures(rounds), details=details)
