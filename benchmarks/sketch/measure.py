"""What does each way of storing a target cost, and how close to the target is the distribution that a reader decodes?

Measured on the logits of real prose, through the codec and back. p is the target, s the decoded distribution, V
the size of the vocabulary, u = 1/V an untrained student. As means over positions:

- bytes: size of a part that holds all positions, as a run commits it, over the number of positions. Every way is stored
  in the same columns, so that tokens, names, the label's log-probability, entropy and metadata are in all of them;
- error: |s - p|^2, summed over the vocabulary;
- bias: |E[s] - p|^2. The expectation is known, and is confirmed by averaging many draws: a sampled tail is right in
  expectation, and counts are, so that threshold sampling is off by the rounding of its head and multinomial sampling
  by nothing; top-k and nucleus draw nothing, so that for them the bias is all of the error;
- variance: error - bias. It averages out over positions and draws, the bias does not;
- angle: in degrees, between u - p and u - s, the gradients of that student's logits under p and under s;
- angle of all: the same of the sums over all positions, where noise cancels and bias adds up. It is not a mean.

Threshold sampling is measured on one draw; "4 draws" stores four tails over one head, one of which is read at a time.
Multinomial sampling of n tokens has a second size, its entries alone in the form that its paper gives: 3 bytes each,
17 bits of id and 7 of count, and one bit more where V > 2^17 and where n > 127. Top-k is stored once and read in two
ways. A ghost token says how much mass is missing, not of which tokens: the gradient of its loss is that of a target
whose missing mass is spread as the student spreads its own, so for the student u it is taken to be spread evenly. The
error is then the same, to 1e-5, as when missing tokens count as zero; what such a student never learns is which of
them are likely.

`sketch_over_log_softmax`: time to sketch 256 rows at tau = 1/24, over that of torch.log_softmax into a tensor that is
there; `_allocating` where that makes its own. One core, float32, the median of the ratios of neighbours in time, each
call on another batch than those before it, so that nobody finds its logits in a cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import RESULTS, ModelName, Options, Positions, Result, positions, require, say, say_table
from benchmarks.sketch.forms import CHUNK, Part, Way, all_ways, read_renormalised, stored_parts
from benchmarks.sketch.rate_distortion import DenseRows, Point, angle_between, draw, errors_of, measured
from softshard.config import ThresholdSketch
from softshard.errors import JobInvalid
from softshard.shard.commit import part_fidelity
from softshard.sketch.philox import draw_uniforms
from softshard.sketch.reduce import sketch_rows, stored_entries
from softshard.sketch.types import SequenceTargets

_SKETCH = ThresholdSketch(tau=1 / 24)
_PICTURE = RESULTS / "rate_distortion.png"
_TITLES: Mapping[ModelName, str] = {"small": "SmolLM2-135M", "large": "Qwen2.5-Coder-0.5B"}
_DENSE_ROWS = 64
"""Rows on which every way is compared with a dense computation."""
_AVERAGED_ROWS, _AVERAGED_DRAWS = 32, 2_000
_BATCHES = 4

FloatArray = NDArray[np.float64]


def _dense(source: Positions, num_rows: int) -> FloatArray:
    """[rows, V] float64 probabilities of the first rows."""
    target: FloatArray = torch.softmax(source.logits(0, num_rows).double(), 1).numpy()
    return target


def _sketch(source: Positions, uniforms: FloatArray) -> SequenceTargets:
    """Of the first rows, as many as there are numbers."""
    rows = slice(0, uniforms.shape[1])
    targets, _ = sketch_rows(
        source.logits(0, rows.stop),
        labels=source.labels[rows],
        uniforms=uniforms,
        settings=_SKETCH,
        vocab_size=source.vocab_size,
        places=source.places[rows],
    )
    return targets


def _check_rows(source: Positions) -> None:
    """Per-label values and heads against a dense float64 computation."""
    target = _dense(source, CHUNK)
    targets = _sketch(source, source.uniforms(seed=0, num_draws=1)[:, :CHUNK])
    in_head = target >= _SKETCH.tau
    heads = [np.flatnonzero(mine)[np.argsort(-row[mine])] for mine, row in zip(in_head, target, strict=True)]
    same = np.array_equal(targets.head_ids, np.concatenate(heads))
    require(same, f"heads of {CHUNK} positions are those of float64")
    logs, labels = np.log(target), np.arange(CHUNK)
    apart = {
        "label log-probabilities": targets.label_logprob - logs[labels, source.labels[:CHUNK].numpy()],
        "entropies": targets.entropy + (target * logs).sum(1),
        "tail masses": targets.tail_mass - np.where(in_head, 0, target).sum(1),
        "head log-probabilities": targets.head_logprobs - logs[np.repeat(labels, targets.head_count), targets.head_ids],
    }
    for name, values in apart.items():
        most = float(np.abs(values).max())
        require(most <= 3e-5, f"their {name} are within {most:.0e} of float64")


def _check_mean(source: Positions) -> dict[str, float]:
    """The mean of many draws against the target.

    A tail entry weighs tau with probability p / tau, so that its variance is p (tau - p). Bernstein's inequality bounds
    the mean of D draws of a value in [0, tau], for all tokens at once but for one run in 10^9. Squared and summed, the
    mean's distance from the target is its bias, and on top of that the variance over D.
    """
    tau, num_draws, vocab_size = _SKETCH.tau, _AVERAGED_DRAWS, source.vocab_size
    target, first = _dense(source, _AVERAGED_ROWS), source.sequences[0]
    noise = draw_uniforms(first.label_indices[:_AVERAGED_ROWS], seed=0, sequence_id=first.sequence_id, draws=num_draws)
    targets = _sketch(source, noise)
    mean = np.zeros((_AVERAGED_ROWS, vocab_size))
    rows = np.arange(_AVERAGED_ROWS)
    tails = np.tile(rows, num_draws).repeat(targets.tail_count)
    np.add.at(mean, (tails, targets.tail_ids), tau / num_draws)
    in_tail = target < tau
    likely = np.where(in_tail, target, 0)
    spread = likely * (tau - likely) / num_draws
    chance = math.log(2 * mean.size * 1e9)
    bound = np.sqrt(2 * spread * chance) + tau * chance / (3 * num_draws)
    within = bool((np.abs(mean - target) <= bound)[in_tail].all())
    require(within, f"tails of {num_draws:,} draws are, in the mean, the target's within Bernstein's bound")
    heads = stored_entries(replace(targets, tail_count=0 * targets.head_count, tail_ids=targets.tail_ids[:0]), _SKETCH)
    mean[rows.repeat(targets.head_count), heads.ids] = heads.weights
    known = np.where(in_tail, 0, mean - target) ** 2
    averaged = ((mean - target) ** 2 - spread).sum(1)
    off = averaged - known.sum(1)
    deviation = off.std() / math.sqrt(len(off))
    claim = f"their bias, {averaged.mean():.1e} with a standard error of {deviation:.0e}, is that of the rounded head"
    require(abs(off.mean()) <= 6 * deviation, f"{claim}, {known.sum(1).mean():.1e}")
    return {"positions": _AVERAGED_ROWS, "draws": num_draws, "bias": averaged.mean(), "standard_error": deviation}


def _check_errors(source: Positions, ways: Sequence[Way], parts: Sequence[Part]) -> None:
    """Errors and angles, which are worked out from entries, against those of full float64 distributions."""
    target = _dense(source, _DENSE_ROWS)
    rows = DenseRows(0, source.logits(0, _DENSE_ROWS))
    apart, turned = 0.0, 0.0
    for way, part in zip(ways, parts, strict=True):
        reading = way.read(part.targets, way.form)
        stored = reading.dense(_DENSE_ROWS, vocab_size=source.vocab_size)
        found = errors_of(reading, rows)
        angles = [angle_between(*pair, num_rows=1) for pair in zip(target, stored, strict=True)]
        apart = max(apart, float(np.abs(found.squared - ((stored - target) ** 2).sum(1)).max()))
        turned = max(turned, float(np.abs(found.angle - angles).max()))
    require(apart <= 1e-6, f"errors of {len(ways)} ways are within {apart:.0e} of those of full distributions")
    require(turned <= 0.05, f"angles are within {turned:.0e} degrees")


def _check_fidelity(points: Sequence[Point], parts: Sequence[Part]) -> None:
    """What a part says of itself against what was measured of it. It counts the ghost's tokens as zero."""
    apart, turned = 0.0, 0.0
    for point, part in zip(points, parts, strict=True):
        if point.way.form.num_samples is None and point.way.read is not read_renormalised:
            said = part_fidelity(part.fidelity, covers_all=False)
            apart = max(apart, abs(said.mean_squared_error - point.squared_error))
            turned = max(turned, abs(said.gradient_angle_degrees - point.angle))
    require(apart <= 1e-5, f"parts have these errors in their metadata, within {apart:.0e}")
    require(turned <= 0.05, f"and these angles, within {turned:.0e} degrees")


def _seconds(source: Positions, *, repeats: int) -> dict[str, list[float]]:
    """Of 256 rows. The batches go round, so that no call meets logits that one of the last three has touched."""
    rows = [slice(start, start + CHUNK) for start in range(0, _BATCHES * CHUNK, CHUNK)]
    batches = [source.logits(one.start, one.stop) for one in rows]
    noise = [np.ascontiguousarray(source.uniforms(seed=0, num_draws=1)[:, one]) for one in rows]
    labels, places = [source.labels[one] for one in rows], [source.places[one] for one in rows]
    out = torch.empty_like(batches[0])

    def sketch(batch: int) -> object:
        return sketch_rows(
            batches[batch],
            labels=labels[batch],
            uniforms=noise[batch],
            settings=_SKETCH,
            vocab_size=source.vocab_size,
            places=places[batch],
        )

    candidates: dict[str, Callable[[int], object]] = {
        "sketch": sketch,
        "log_softmax": lambda batch: torch.log_softmax(batches[batch], 1, out=out),
        "log_softmax_allocating": lambda batch: torch.log_softmax(batches[batch], 1),
    }
    calls = itertools.cycle(range(_BATCHES))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, candidate in candidates.items():
            batch = next(calls)
            started = time.perf_counter()
            candidate(batch)
            if repeat:  # the first round makes what is kept from call to call
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _times(source: Positions, *, repeats: int) -> dict[str, float]:
    seconds = _seconds(source, repeats=repeats)
    sketch = seconds["sketch"]
    ratios = {
        f"sketch_over_{name}": statistics.median(a / b for a, b in zip(sketch, seconds[name], strict=True))
        for name in ("log_softmax", "log_softmax_allocating")
    }
    return ratios | {f"{name}_us_per_row": statistics.median(taken) / CHUNK * 1e6 for name, taken in seconds.items()}


def _figures(points: Sequence[Point]) -> dict[str, float]:
    """Named figures of the points that others are held against."""
    by_title = {point.way.title: point for point in points}
    named = {
        "threshold_24": by_title["threshold 1/24"],
        "multinomial_50": by_title["multinomial 50"],
        "topk_64": by_title["top-k renormalised 64"],
        "topk_64_ghost": by_title["top-k with ghost 64"],
    }
    figures = {}
    for name, point in named.items():
        figures[f"{name}_bytes"] = point.num_bytes
        figures[f"{name}_entries"] = point.num_entries
        figures[f"{name}_mse"] = point.squared_error
        figures[f"{name}_bias"] = point.bias
        figures[f"{name}_angle"] = point.angle
        figures[f"{name}_angle_of_all"] = point.angle_of_all
        if point.published_bytes is not None:
            figures[f"{name}_published_bytes"] = point.published_bytes
    return figures | {"threshold_24_draws_4_bytes": by_title["threshold 1/24, 4 draws"].num_bytes}


def _say_points(points: Sequence[Point], times: Mapping[str, float], source: Positions, title: str) -> None:
    say(f"{title}, V = {source.vocab_size:,}, {len(source.states):,} positions")
    say("bias, variance and error in units of 1e-4, angles in degrees")
    columns = ("", "entries", "bytes", "bias", "var.", "error", "angle", "of all")
    say_table(
        columns,
        [
            (
                point.way.title,
                *(f"{value:.1f}" for value in (point.num_entries, point.num_bytes)),
                *(f"{1e4 * value:.2f}" for value in (point.bias, point.variance, point.squared_error)),
                *(f"{value:.2f}" for value in (point.angle, point.angle_of_all)),
            )
            for point in points
        ],
    )
    alone = [f"{p.way.mark}: {p.published_bytes:.1f}" for p in points if p.published_bytes is not None]
    say("bytes of multinomial sampling's entries alone, in their published form:")
    say(", ".join(alone))
    row = {name.removesuffix("_us_per_row"): f"{value:.0f}" for name, value in times.items() if "_us_" in name}
    sketch, softmax, allocating = row.values()
    say(f"microseconds a row: sketch {sketch}, log-softmax {softmax}, allocating {allocating}")


def _recorded(point: Point) -> dict[str, Any]:
    values = {field.name: getattr(point, field.name) for field in fields(point) if field.name != "way"}
    return {"way": point.way.title, **values, "variance": point.variance}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """All that is measured of one model."""

    title: str
    points: list[Point]
    figures: dict[str, float]
    details: dict[str, Any]


def _measure_model(model: ModelName, source: Positions, *, quick: bool) -> _Measured:
    ways = all_ways(quick=quick)
    forms = list(dict.fromkeys(way.form for way in ways))
    _check_rows(source)
    averaged = _check_mean(source)
    stored = dict(zip(forms, stored_parts(source, forms), strict=True))
    parts = [stored[way.form] for way in ways]
    _check_errors(source, ways, parts)
    points = measured(source, ways, parts)
    _check_fidelity(points, parts)
    times = _times(source, repeats=12 if quick else 40)
    _say_points(points, times, source, _TITLES[model])
    return _Measured(
        title=f"{_TITLES[model]}, V = {source.vocab_size:,}",
        points=points,
        figures=_figures(points) | times,
        details={
            "model": _TITLES[model],
            "positions": len(source.states),
            "vocab_size": source.vocab_size,
            "ways": [_recorded(point) for point in points],
            "bias_of_threshold_24_by_averaging": averaged,
            "batches_timed": _BATCHES,
        },
    )


def _sources(options: Options) -> dict[ModelName, Positions]:
    """The models that are there."""
    num_positions = 8_000 if options.quick else 24_000
    sources: dict[ModelName, Positions] = {
        "small": positions("small", num_positions=num_positions, cache=options.cache)
    }
    if not options.quick:
        try:
            sources["large"] = positions("large", num_positions=8_000, cache=options.cache)
        except JobInvalid as error:
            say(f"the larger vocabulary is left out: {error}")
    return sources


def measure(options: Options) -> Result:
    sources = _sources(options)
    torch.set_num_threads(1)
    found = {model: _measure_model(model, source, quick=options.quick) for model, source in sources.items()}
    if not options.quick:
        draw({one.title: one.points for one in found.values()}, _PICTURE)
    figures = {
        f"{'' if model == 'small' else f'{model}_'}{name}": float(f"{value:.4g}")
        for model, one in found.items()
        for name, value in one.figures.items()
    }
    return Result(figures=figures, details={model: one.details for model, one in found.items()})
