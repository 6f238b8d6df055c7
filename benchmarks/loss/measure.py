"""What does training from stored targets cost beside cross-entropy, in time and in memory?

A step: SmolLM2-135M with the default LoRA of a job on speeches, one thread, from targets of threshold 1/24 (alpha = .5)
and with cross-entropy in the same chunks, both from sequences in memory to the updated adapter. The two alternate, and
the figure is the median of their ratios. Times are CPU seconds of the one thread, which other work on the machine
lengthens less than wall-clock time. Memory is the peak of a separate process.

The loss alone: from hidden states and an output matrix to the loss and the gradient of the hidden states, for several
numbers of positions and vocabulary sizes, each loss in a separate process. Dense KL is the plain one: both models'
logits, softmax, `torch.nn.functional.kl_div`. Where LIGER names a folder with `liger_kernel`, and AXOLOTL one with
`axolotl` (an unpacked wheel will do), their losses are measured too, if they run on a CPU; they always compute the
gradient of the matrix, so ours does too beside them ("trained"). Ratios of times come from losses that alternate in one
process.

Memory is the increase of a process's peak resident size over its size when all inputs were there: for two steps, over
the loaded model and its adapter.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch.nn import functional

from benchmarks.harness import Options, Result, interleaved, require, say, say_table
from benchmarks.loss.loss_functions import WAYS, Problem, fused_by_triton, problem
from benchmarks.loss.training_step import STEPS, Trainer

Answer = TypeVar("Answer")
Grid = Sequence[tuple[int, int]]
"""Numbers of positions, and sizes of vocabularies."""

_WIDTH = 576
"""Of SmolLM2-135M's hidden states."""
_QUICK_WIDTH = 64
"""Where memory alone is asked for, which hardly depends on it."""
_RIVALS = ("sketch", "topk_ghost", "chunked_ce")
"""Ways with a frozen matrix whose times are compared."""
_FULL_GRID: Grid = (
    (1_024, 32_768),
    (8_192, 49_152),
    (16_384, 32_768),
    (1_024, 262_144),
)
_QUICK_GRID: Grid = ((2_048, 49_152),)
_QUICK_WAYS = ("sketch", "chunked_ce", "dense_kl")
_FIGURE_AT, _QUICK_FIGURE_AT = (8_192, 49_152), (2_048, 49_152)
"""The size whose memory is a figure."""
_DENSE_TENSORS = 6
"""[N, V] tensors that dense KL has at one time, at most; and so the memory that must be free for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    seconds: float
    peak_mib: float


def _alone(task: Callable[..., Answer], *arguments: Any) -> Answer:
    """Answer of a task in a new process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def _measured(task: Callable[[], object], *, repeats: int) -> Cost:
    """Least CPU time and highest resident size of some repeats in this process."""
    process, seconds = psutil.Process(), float("inf")
    held = process.memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    for _ in range(repeats):
        started = time.process_time()
        task()
        seconds = min(seconds, time.process_time() - started)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    highest = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return Cost(seconds=seconds, peak_mib=(highest - held / 1024) / 1024)


def loss_alone(way: str, num_positions: int, vocab_size: int, width: int) -> Cost:
    torch.set_num_threads(1)
    # What the libraries take for themselves at a first call is no cost of the loss.
    torch.autograd.backward(WAYS[way](problem(8, 512, width=16)))
    given = problem(num_positions, vocab_size, width=width)
    return _measured(lambda: _forward_and_backward(way, given), repeats=1)


def loss_times(num_positions: int, repeats: int) -> dict[str, float]:
    """CPU seconds of ways that take turns, with a frozen matrix."""
    torch.set_num_threads(1)
    given = problem(num_positions, _FIGURE_AT[1], width=_WIDTH)
    ways = {way: partial(_forward_and_backward, way, given) for way in _RIVALS}
    return interleaved(ways, repeats=repeats, clock=time.process_time)


def _forward_and_backward(way: str, given: Problem) -> None:
    given.hidden.grad = given.weight.grad = None
    torch.autograd.backward(WAYS[way](given))


def step_memory(name: str, cache: Path, num_positions: int) -> float:
    """MiB of two steps: the first leaves the optimiser's state to the second."""
    torch.set_num_threads(1)
    trainer = Trainer(cache, num_positions=num_positions)
    return _measured(lambda: trainer.step(STEPS[name]), repeats=2).peak_mib


def step_times(cache: Path, num_positions: int, rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    trainer = Trainer(cache, num_positions=num_positions)
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(rounds + 1):
        for name in sorted(STEPS, reverse=bool(number % 2)):
            started = time.process_time()
            trainer.step(STEPS[name])
            if number > 0:
                seconds[name].append(time.process_time() - started)
    return seconds


def check_losses() -> None:
    """Every way against another route, in float64."""
    given = problem(40, 512, width=16, kind=torch.float64)
    logits = given.hidden @ given.weight.T
    logs, base = torch.log_softmax(logits, 1), torch.softmax(given.base @ given.weight.T, 1)
    top = -(given.top_weights * logs.gather(1, given.top_ids))
    outside = torch.ones_like(logs).scatter_(1, given.top_ids, 0)
    entropy = -(given.top_weights * given.top_weights.log()).sum()
    expected = {
        "sketch": top[:, :13].sum(),
        "topk_ghost": top.sum() - 0.1 * (logs.exp() * outside).sum(1).log().sum(),
        "chunked_ce": functional.cross_entropy(logits, given.labels, reduction="sum"),
        "dense_kl": (base * (base.log() - logs)).sum(),
        "sketch_trained": top[:, :13].sum(),
        "topk_trained": top.sum(),
        "liger_jsd": (base * (base.log() - logs)).sum(),
        "axolotl_topk": top.sum() - entropy,
    }
    assert set(expected) == set(WAYS)
    for name in _ways_here():
        ours = WAYS[name](given)
        slope, right = (torch.autograd.grad(x, given.hidden, retain_graph=True)[0] for x in (ours, expected[name]))
        off = max(abs(ours.item() / expected[name].item() - 1), float((slope - right).norm() / right.norm()))
        require(off < 1e-5, f"{name}: loss and gradient are those of a dense computation, off by {off:.0e}")


def check_step(cache: Path, num_positions: int) -> None:
    """With alpha 1 the two steps are the same, in float32."""
    torch.set_num_threads(1)
    trainer = Trainer(cache, num_positions=num_positions, dtype=torch.float32)
    ours, theirs = trainer.from_targets(alpha=1.0).item(), trainer.cross_entropy().item()
    off = abs(ours / theirs - 1)
    require(off < 1e-5, f"from targets of alpha 1, the step's loss is its cross-entropy: off by {off:.0e}")


def _ways_here() -> list[str]:
    """All but those of others whose code is not here."""
    here, small = [], problem(8, 512, width=16)
    for name, way in WAYS.items():
        try:
            way(small)
        except (ImportError, KeyError) as error:
            say(f"{name}: not measured, {type(error).__name__}: {error}")
        else:
            here.append(name)
    return here


def say_why_not_triton() -> str:
    """What Liger's fused linear cross-entropy, which is a Triton kernel, answers on this machine."""
    try:
        fused_by_triton(problem(8, 512, width=16))
    except (ImportError, RuntimeError, ValueError) as error:
        answer = f"{type(error).__name__}: {error}"
    else:
        answer = "it ran"
    say(f"Liger's fused linear cross-entropy (Triton) on a CPU: {answer}")
    return answer


def measure_losses(ways: Sequence[str], grid: Grid, *, width: int) -> list[dict[str, Any]]:
    rows = []
    for num_positions, vocab_size in grid:
        needed, free = 4 * num_positions * vocab_size * _DENSE_TENSORS, psutil.virtual_memory().available
        for way in ways:
            row: dict[str, Any] = {"way": way, "positions": num_positions, "vocabulary": vocab_size}
            if way == "dense_kl" and needed > 0.9 * free:
                row |= {"not_run": f"needs some {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"}
            else:
                cost = _alone(loss_alone, way, num_positions, vocab_size, width)
                row |= {"seconds": cost.seconds, "peak_mib": cost.peak_mib}
            rows.append(row)
    say_table(
        ("way", "positions", "vocabulary", "seconds", "MiB"),
        [(row["way"], f"{row['positions']:,}", f"{row['vocabulary']:,}", *_cells(row)) for row in rows],
    )
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    return ("-", "-") if "not_run" in row else (f"{row['seconds']:.2f}", f"{row['peak_mib']:,.0f}")


def measure(options: Options) -> Result:
    torch.set_num_threads(1)
    num_positions, rounds = (120, 2) if options.quick else (2_000, 9)
    check_losses()
    _alone(check_step, options.cache, min(num_positions, 500))
    triton = say_why_not_triton()
    seconds = _alone(step_times, options.cache, num_positions, rounds)
    memory = {name: _alone(step_memory, name, options.cache, num_positions) for name in STEPS}
    say_table(
        (f"step of {num_positions:,} labels", "seconds", "MiB"),
        [(name, f"{statistics.median(seconds[name]):.2f}", f"{memory[name]:,.0f}") for name in STEPS],
    )
    ratios = [ours / ce for ours, ce in zip(seconds["from_targets"], seconds["cross_entropy"], strict=True)]
    ways = _QUICK_WAYS if options.quick else _ways_here()
    times = _alone(loss_times, 256 if options.quick else 4_096, 2 if options.quick else 5)
    grid, width = (_QUICK_GRID, _QUICK_WIDTH) if options.quick else (_FULL_GRID, _WIDTH)
    rows = measure_losses(ways, grid, width=width)
    figure_at = _QUICK_FIGURE_AT if options.quick else _FIGURE_AT
    at = {row["way"]: row for row in rows if (row["positions"], row["vocabulary"]) == figure_at}
    require("peak_mib" in at["dense_kl"], f"there was memory for dense KL at {figure_at[0]:,} positions")
    return Result(
        figures={
            "step_time_over_ce": round(statistics.median(ratios), 3),
            "step_memory_over_ce": round(memory["from_targets"] / memory["cross_entropy"], 3),
            "dense_memory_over_loss": round(at["dense_kl"]["peak_mib"] / at["sketch"]["peak_mib"], 1),
            "loss_time_over_ce": round(times["sketch"] / times["chunked_ce"], 3),
            "ghost_time_over_ce": round(times["topk_ghost"] / times["chunked_ce"], 3),
        },
        details={
            "step": {"labels": num_positions, "seconds": seconds, "peak_mib": memory, "ratios": ratios},
            "loss_alone": {"width": width, "seconds_in_turns": times, "rows": rows},
            "liger_triton_on_cpu": triton,
        },
    )
