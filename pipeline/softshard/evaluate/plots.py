"""The plots of the report as SVG elements of a page: each is declared once, in `PLOTS`.

In: plain numbers. Out: an `<svg>` element, the same bytes for the same numbers, that refers to nothing outside it; its
text is text, set in the font of the page. Models differ in colour (Okabe and Ito) and in line style. To add a plot,
write a function that draws it and add one entry to `PLOTS`; data that the report lacks goes into `PlotData`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from softshard.evaluate.report import Report, TrainingStep

if TYPE_CHECKING:
    from softshard.evaluate.scoring import ReliabilityBin

__all__ = [
    "MODEL_COLOURS",
    "MODEL_NAMES",
    "PLOTS",
    "Plot",
    "PlotData",
]

MODEL_NAMES = {"human": "human", "base": "base", "ce": "cross-entropy", "adapter": "adapter"}
MODEL_COLOURS = {"human": "#1a1d21", "base": "#8a8f98", "ce": "#0072b2", "adapter": "#d55e00"}
_LINES: dict[str, Any] = {"human": "-", "base": (0, (4, 2)), "ce": (0, (6, 1.5, 1.2, 1.5)), "adapter": "-"}
_MARKERS = {"base": "s", "ce": "^", "adapter": "o"}
_OTHER_COLOURS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a51a3", "#5b6470")
_INK, _MUTED, _GRID = "#1a1d21", "#5b6470", "#e3e6ea"
_SIZE = (6.0, 4.2)
_MIN_BIN_LABELS = 10
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotData:
    """What the plots show beyond the report; keys are `human`, `base`, `ce` where there is one, and `adapter`."""

    sentence_lengths: Mapping[str, Sequence[int]]
    """Words per sentence."""
    rank_frequency: Mapping[str, Sequence[float]]
    """Relative frequencies of words, most frequent first."""
    reliability: Mapping[str, Sequence[ReliabilityBin]]
    """Calibration bins; no `human`."""


def _training_svg(training: Mapping[str, Sequence[TrainingStep]]) -> str:
    """Loss over steps, one curve per training with a bold running mean; below it the retention loss, if any."""
    retained = {name: [step for step in steps if step.retention_loss is not None] for name, steps in training.items()}
    rows = 2 if any(retained.values()) else 1
    with _figure("training") as (figure, finished):
        ratios = [2, 1][:rows]
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        colours = iter(_OTHER_COLOURS * (1 + len(training) // len(_OTHER_COLOURS)))
        for name, steps in training.items():
            colour = MODEL_COLOURS.get(name) or next(colours)
            _curve(axes[0], name, colour, [s.step for s in steps], [s.loss for s in steps])
            if rows == 2 and retained[name]:
                losses = [float(s.retention_loss or 0) for s in retained[name]]
                _curve(axes[1], name, colour, [s.step for s in retained[name]], losses)
        axes[0].set_ylabel("loss, nats per token")
        axes[-1].set_xlabel("step")
        _legend(axes[0], "upper right", columns=1 + len(training) // 4)
        if rows == 2:
            axes[1].set_ylabel("retention loss")
    return finished[0]


def _curve(axes: Any, name: str, colour: str, steps: Sequence[int], losses: Sequence[float]) -> None:
    label, line = MODEL_NAMES.get(name, name), _LINES.get(name, "-")
    width = max(1, len(losses) // 20)
    if width == 1:
        axes.plot(steps, losses, color=colour, linestyle=line, label=label)
        return
    axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.9)
    means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width - 1 :], means, color=colour, linestyle=line, label=label)


def _sentence_lengths_svg(lengths: Mapping[str, Sequence[int]]) -> str:
    """Cumulative distributions of sentence lengths; the area between two of them is their Wasserstein-1 distance."""
    with _figure("sentences") as (figure, finished):
        axes = figure.subplots()
        longest = max((max(words) for words in lengths.values() if words), default=1)
        for name, words in lengths.items():
            if words:
                values, counts = np.unique(words, return_counts=True)
                shares = np.concatenate([[0.0], np.cumsum(counts) / len(words), [1.0]])
                at = np.concatenate([[0], values, [longest * 1.02]])
                axes.step(at, shares, where="post", label=MODEL_NAMES[name], **_line(name))
        axes.set(xlim=(0, longest * 1.02), ylim=(0, 1.01))
        axes.set(xlabel="words in a sentence", ylabel="share of sentences up to that length")
        _legend(axes, "lower right")
    return finished[0]


def _rank_frequency_svg(frequencies: Mapping[str, Sequence[float]]) -> str:
    """Relative frequency of each word against its rank, both logarithmic."""
    with _figure("ranks") as (figure, finished):
        axes = figure.subplots()
        for name, shares in frequencies.items():
            if shares:
                axes.plot(np.arange(1, len(shares) + 1), shares, label=MODEL_NAMES[name], **_line(name))
        axes.set(xscale="log", yscale="log", xlabel="rank of the word", ylabel="share of all words")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        _legend(axes, "upper right")
    return finished[0]


def _calibration_svg(reliability: Mapping[str, Sequence[ReliabilityBin]]) -> str:
    """Share of correct most likely tokens against their probability; bins with few labels are left out."""
    with _figure("calibration") as (figure, finished):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=":", label="perfect")
        for name, bins in reliability.items():
            shown = [each for each in bins if each.num_labels >= _MIN_BIN_LABELS]
            axes.plot(
                [each.confidence for each in shown],
                [each.accuracy for each in shown],
                marker=_MARKERS[name],
                markersize=5,
                label=MODEL_NAMES[name],
                **_line(name),
            )
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set(xlabel="probability of the most likely token", ylabel="share where it is the human one")
        _legend(axes, "upper left")
    return finished[0]


def _legend(axes: Any, location: str, *, columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=location, ncols=columns)


def _line(name: str) -> dict[str, Any]:
    return {"color": MODEL_COLOURS[name], "linestyle": _LINES[name], "zorder": 3 if name == "adapter" else 2}


@contextmanager
def _figure(salt: str) -> Iterator[tuple[Any, list[str]]]:
    """A matplotlib figure; when the block ends, its SVG is appended to the list."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": f"softshard {salt}"}):
        figure, finished = Figure(figsize=_SIZE, layout="constrained"), list[str]()
        yield figure, finished
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
        finished.append(_inline(sink.getvalue()))


def _inline(svg: str) -> str:
    """An SVG document as an element of a page, without header, size, namespaces, metadata and unused ids."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>\s*", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None, "matplotlib gives every figure a viewBox"
    rest = rest.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", rest)
    return f"<svg {view[0]}>{rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot of the page."""

    title: str
    caption: str
    description: str
    """For readers who cannot see it."""
    draw: Callable[[Report, PlotData], str]
    """Its SVG element."""


PLOTS: tuple[Plot, ...] = (
    Plot(
        title="Training",
        caption="Loss of each training; thin lines are single steps, bold ones their running mean. Curves of"
        " different objectives differ in level by what their targets leave undecided.",
        description="Line chart: training loss over steps.",
        draw=lambda report, data: _training_svg(report.training),
    ),
    Plot(
        title="Sentence lengths",
        caption="Share of sentences up to each length. The area between a curve and the human one is the"
        " distance in the table.",
        description="Line chart: cumulative distribution of sentence lengths, human and each model.",
        draw=lambda report, data: _sentence_lengths_svg(data.sentence_lengths),
    ),
    Plot(
        title="Rank and frequency of words",
        caption="Each word’s share against its rank. A curve that ends early uses fewer different words.",
        description="Line chart with logarithmic axes: word frequency against rank, human and each model.",
        draw=lambda report, data: _rank_frequency_svg(data.rank_frequency),
    ),
    Plot(
        title="Calibration",
        caption="On the dotted line, a token held to be 70 % likely is right 70 times in 100; below it the"
        " model is too sure. Bins of fewer than 10 tokens are left out.",
        description="Line chart: share of right first guesses against the model’s confidence.",
        draw=lambda report, data: _calibration_svg(data.reliability),
    ),
)
"""In the order of the page."""
