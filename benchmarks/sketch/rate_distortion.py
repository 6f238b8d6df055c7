"""Rate and distortion of every way of storing a target, and their plot.

In: N targets as readers decode them, and the model's own logits. Out: for each way its entries, bytes and errors, as
means over positions, by the definitions of `measure.py`; a PNG of bytes against squared error.

Only sums over entries are needed, besides |p|^2. Mass m that is spread evenly over the V - E tokens without an entry
adds m / (V - E) (1 - sum of p over entries) to s.p and m^2 / (V - E) to |s|^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import Positions, require
from benchmarks.sketch.forms import CHUNK, Part, Reading, Way

__all__ = ["DenseRows", "Errors", "Point", "angle_between", "draw", "errors_of", "measured"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Of some positions, [n] each."""

    squared: FloatArray
    bias: FloatArray
    variance: FloatArray
    """What theory says of it; zero where nothing is drawn."""
    angle: FloatArray
    """Degrees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Means over positions."""

    way: Way
    num_entries: float
    """All that is stored."""
    num_bytes: float
    published_bytes: float | None
    """Of the entries alone in the form that the paper gives; None but for multinomial sampling."""
    squared_error: float
    bias: float
    angle: float
    angle_of_all: float

    @property
    def variance(self) -> float:
        return self.squared_error - self.bias


class DenseRows:
    """The targets of some positions.

    Args:
        start: the first of them.
        logits: [n, V] float32, which become the probabilities.
    """

    def __init__(self, start: int, logits: Tensor) -> None:
        self.num_rows, self.vocab_size = logits.shape
        self.slice = slice(start, start + self.num_rows)
        self._probabilities = torch.softmax(logits, 1, out=logits)
        # The float32 softmax itself is off by up to 1e-5 over a large vocabulary.
        total = self._probabilities.sum(1, dtype=torch.float64)
        self._total = total.numpy()
        self.squares: FloatArray = (self._probabilities.square().sum(1, dtype=torch.float64) / total**2).numpy()

    def sum(self) -> FloatArray:
        """[V] float64"""
        weights = torch.from_numpy(1 / self._total)
        total: FloatArray = (self._probabilities.double() * weights[:, None]).sum(0).numpy()
        return total

    def at(self, rows: NDArray[np.int64], ids: NDArray[np.int32]) -> FloatArray:
        """[E] probabilities of some tokens."""
        found = self._probabilities[torch.from_numpy(rows), torch.from_numpy(ids).long()]
        exact: FloatArray = found.double().numpy() / self._total[rows]
        return exact


def errors_of(reading: Reading, rows: DenseRows) -> Errors:
    """Errors of a reading in some positions."""
    vocab_size, here = rows.vocab_size, rows.slice
    at, ids, weights, even = reading.part_of(here, vocab_size)
    targets = rows.at(at, ids)

    def per_row(values: FloatArray) -> FloatArray:
        return np.bincount(at, weights=values, minlength=rows.num_rows).astype(np.float64)

    product = per_row(weights * targets) + even * (1 - per_row(targets))
    square = per_row(weights**2) + even * reading.spread[here]
    mass = per_row(weights) + reading.spread[here]
    squared = np.maximum(rows.squares + square - 2 * product, 0)
    lengths = np.sqrt((rows.squares - 1 / vocab_size) * (square - (2 * mass - 1) / vocab_size))
    angle = np.degrees(np.arccos(np.clip((product - mass / vocab_size) / lengths, -1, 1)))
    bias, variance = squared, np.zeros(rows.num_rows)
    if reading.variance is not None:
        certain = reading.certain[slice(*reading.entries.offsets[[here.start, here.stop]])]
        bias = per_row(np.where(certain, weights - targets, 0) ** 2)
        known = np.where(certain, targets, 0)
        variance = reading.variance(1 - per_row(known), rows.squares - per_row(known**2))
    return Errors(squared=squared, bias=bias, variance=variance, angle=angle)


def measured(source: Positions, ways: Sequence[Way], parts: Sequence[Part]) -> list[Point]:
    """A point for each way and its part. Raises WrongAnswer where errors or samples are not what theory says."""
    readings = [way.read(part.targets, way.form) for way, part in zip(ways, parts, strict=True)]
    found: list[list[Errors]] = [[] for _ in ways]
    sums = np.zeros((len(ways), source.vocab_size))
    target = np.zeros(source.vocab_size)
    for start in range(0, len(source.states), CHUNK):
        rows = DenseRows(start, source.logits(start, min(start + CHUNK, len(source.states))))
        target += rows.sum()
        for number, reading in enumerate(readings):
            found[number].append(errors_of(reading, rows))
            sums[number] += reading.sum_of(rows.slice, vocab_size=source.vocab_size)
    errors = [_joined(one) for one in found]
    off = max(_deviations(one) for one in errors if one.variance.any())
    require(off <= 6, f"squared errors are within {off:.1f} standard errors of what theory says")
    samples = [(one, way.form.num_samples) for way, one in zip(ways, sums, strict=True) if way.form.num_samples]
    fair = all(_is_fair(one, target, num_rows=len(source.states), num_samples=n) for one, n in samples)
    require(fair, "multinomial samples of all positions agree with the targets within Bernstein's bound")
    angles = [angle_between(target, one, num_rows=len(source.states)) for one in sums]
    return [_point(*one, source.vocab_size) for one in zip(ways, parts, errors, angles, strict=True)]


def _joined(found: Sequence[Errors]) -> Errors:
    return Errors(
        **{field.name: np.concatenate([getattr(one, field.name) for one in found]) for field in fields(Errors)}
    )


def _deviations(errors: Errors) -> float:
    """How far the squared error is from its expectation, in standard errors of what is between them."""
    off = errors.squared - errors.bias - errors.variance
    return float(abs(off.mean()) / off.std() * np.sqrt(len(off)))


def _is_fair(stored: FloatArray, target: FloatArray, *, num_rows: int, num_samples: int) -> bool:
    """Compare the sums of all samples, [V], with those of the targets: token by token, and of all tokens up to each id.

    Of N n independent draws each counts 1/n or nothing. The variance of their sum is at most that of draws that are all
    made with the mean probability q, N q (1 - q) / n. Bernstein's inequality, for all 2 V sums but for one run in 10^9.
    """
    chance = math.log(4 * len(target) * 1e9)
    found, expected = (np.concatenate([one, one.cumsum()]) for one in (stored, target))
    share = (expected / num_rows).clip(0, 1)
    bound = np.sqrt(2 * num_rows * share * (1 - share) / num_samples * chance) + chance / (3 * num_samples)
    return bool((np.abs(found - expected) <= bound).all())


def angle_between(target: FloatArray, stored: FloatArray, *, num_rows: int) -> float:
    """Degrees between n u - target and n u - stored, where [V] target and stored are sums of n distributions."""
    first, second = (num_rows / len(sums) - sums for sums in (target, stored))
    return math.degrees(math.acos(min(first @ second / np.linalg.norm(first) / np.linalg.norm(second), 1)))


def _point(way: Way, part: Part, errors: Errors, angle_of_all: float, vocab_size: int) -> Point:
    num_entries, published = part.num_entries / len(errors.squared), None
    if (n := way.form.num_samples) is not None:
        bits = max(17, (vocab_size - 1).bit_length()) + max(7, n.bit_length())
        published = num_entries * bits / 8
    return Point(
        way=way,
        num_entries=num_entries,
        num_bytes=part.num_bytes / len(errors.squared),
        published_bytes=published,
        squared_error=float(errors.squared.mean()),
        bias=float(errors.bias.mean()),
        angle=float(errors.angle.mean()),
        angle_of_all=angle_of_all,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """How a family is drawn."""

    colour: str
    marker: str
    is_biased: bool
    label_offset: tuple[float, float]
    """Of its points' marks, in points."""


_LOOKS = {
    "threshold": _Look(colour="#0072b2", marker="o", is_biased=False, label_offset=(-9, -12)),
    "multinomial": _Look(colour="#d55e00", marker="s", is_biased=False, label_offset=(11, 12)),
    "top-k renormalised": _Look(colour="#8a5a99", marker="^", is_biased=True, label_offset=(-4, -13)),
    "top-k with ghost": _Look(colour="#009e73", marker="D", is_biased=True, label_offset=(-4, -13)),
    "nucleus": _Look(colour="#1a1d21", marker="P", is_biased=True, label_offset=(4, 12)),
}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#5b6470",
    "axes.grid": True,
    "axes.labelcolor": "#1a1d21",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#e3e6ea",
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "text.parse_math": False,
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
}


def draw(points: Mapping[str, Sequence[Point]], file: Path) -> None:
    """One panel a model, by its title; a line a family, filled where the error is noise, hollow where it is bias."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.4 * len(points) + 0.4), layout="constrained")
        panels = figure.subplots(len(points), sharex=True, sharey=True, squeeze=False)[:, 0]
        for panel, (title, found) in zip(panels, points.items(), strict=True):
            _draw_panel(panel, found)
            panel.set_title(title, loc="left", fontsize=11)
        panels[0].legend(loc="upper right", frameon=False, fontsize=9.5)
        panels[-1].set_xlabel("bytes per position on disk, everything in the row")
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})


def _draw_panel(panel: Axes, points: Sequence[Point]) -> None:
    panel.set(xscale="log", yscale="log", ylabel="squared error of a position")
    halo = [Stroke(linewidth=2.5, foreground="white"), Normal()]
    for family, look in _LOOKS.items():
        line = [point for point in points if point.way.family == family and point.way.form.draws == 1]
        filling = "white" if look.is_biased else look.colour
        name = f"{family}: {'bias, which stays' if look.is_biased else 'noise, which averages out'}"
        places = [(point.num_bytes, point.squared_error) for point in line]
        panel.plot(
            *zip(*places, strict=True), color=look.colour, marker=look.marker, markerfacecolor=filling, label=name
        )
        for place, point in zip(places, line, strict=True):
            panel.annotate(
                point.way.mark,
                place,
                xytext=look.label_offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=9,
                color=look.colour,
                path_effects=halo,
            )
    panel.xaxis.set_major_locator(FixedLocator([10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=0.04, y=0.09)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10f}".rstrip("0").rstrip(".")))
