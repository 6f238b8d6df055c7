"""The report as one self-contained HTML page.

In: the record of an evaluation and the data of its figures. Out: HTML that fetches nothing. Everything that comes from
a corpus, a model or a job file is text to the page and is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from softshard.config import Job
from softshard.evaluate.plots import (
    MODEL_COLOURS,
    MODEL_NAMES,
    FigureData,
    calibration_svg,
    rank_frequency_svg,
    sentence_lengths_svg,
    training_svg,
)
from softshard.evaluate.report import HumanMetrics, ModelMetrics, NllDifference, Report

__all__ = ["render_page"]

_EXAMPLES_OPEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metric:
    """One row of the comparison; `better` says which value is marked."""

    key: str
    name: str
    explanation: str
    better: Literal["low", "high", "human", "none"]
    show: Callable[[float], str]


def _decimals(num: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{num}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


_GROUPS: tuple[tuple[str, tuple[_Metric, ...]], ...] = (
    (
        "Predicting human text",
        (
            _Metric(
                key="human_nll_nats",
                name="Loss on human text, nats a token",
                explanation="How surprised the model is, on average, by the next token that a person wrote.",
                better="low",
                show=_decimals(3),
            ),
            _Metric(
                key="bits_per_byte",
                name="Bits a byte",
                explanation="The same loss as the size to which the model would compress the text.",
                better="low",
                show=_decimals(3),
            ),
            _Metric(
                key="kl_to_teacher_nats",
                name="Distance from the style teacher, nats",
                explanation="Mean KL divergence of the model from the teacher’s whole distribution.",
                better="low",
                show=_decimals(3),
            ),
            _Metric(
                key="ece",
                name="Calibration error",
                explanation="How far the model’s confidence lies from how often it is right.",
                better="low",
                show=_percent,
            ),
            _Metric(
                key="accuracy",
                name="Right first guess",
                explanation="How often the most likely token is the one that the person wrote.",
                better="high",
                show=_percent,
            ),
            _Metric(
                key="mean_entropy_nats",
                name="Entropy, nats",
                explanation="How open the model holds the next token. Near the loss when it is well calibrated.",
                better="none",
                show=_decimals(2),
            ),
        ),
    ),
    (
        "Writing freely, beside what people wrote",
        (
            _Metric(
                key="sentence_length_w1",
                name="Sentence lengths, distance in words",
                explanation="By how many words lengths differ when short is matched with short and long with long.",
                better="low",
                show=_decimals(2),
            ),
            _Metric(
                key="token_l2",
                name="Token frequencies, distance",
                explanation="Euclidean distance of the frequencies of all tokens.",
                better="low",
                show=_decimals(4),
            ),
            _Metric(
                key="mattr",
                name="Variety of words (MATTR)",
                explanation="Share of different words within any 50 in a row.",
                better="human",
                show=_decimals(3),
            ),
            _Metric(
                key="distinct_2",
                name="Distinct pairs of words",
                explanation="Share of word pairs that are different ones; low means stock phrases.",
                better="human",
                show=_decimals(3),
            ),
            _Metric(
                key="distinct_3",
                name="Distinct triples of words",
                explanation="The same for three words in a row.",
                better="human",
                show=_decimals(3),
            ),
            _Metric(
                key="mean_sentence_words",
                name="Words a sentence",
                explanation="Mean length of a sentence.",
                better="human",
                show=_decimals(1),
            ),
            _Metric(
                key="mean_sample_tokens",
                name="Tokens a continuation",
                explanation="Mean length, up to the limit; shorter where a text was brought to an end.",
                better="none",
                show=_decimals(1),
            ),
        ),
    ),
    (
        "What it keeps and what it costs",
        (
            _Metric(
                key="retention_nll_nats",
                name="Loss on other writing, nats a token",
                explanation="The same loss on held-out text of another kind: what the model still knows.",
                better="low",
                show=_decimals(3),
            ),
            _Metric(
                key="ms_per_token",
                name="Milliseconds a token",
                explanation="Time of one decoding step a sequence, on the machine of this run.",
                better="none",
                show=_decimals(1),
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bucket:
    column: str
    text: str
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    title: str
    caption: str
    description: str
    svg: str


def render_page(report: Report, *, figures: FigureData) -> str:
    """The whole page.

    Raises:
        ValidationError: `report.settings` is no dump of a job.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("softshard", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "change": _change, "shown": _shown}
    models = {"base": report.base, "ce": report.ce, "adapter": report.adapter}
    return environment.get_template("report.html").render(
        report=report,
        job=Job.model_validate(report.settings),
        settings=_yaml(report.settings),
        names=MODEL_NAMES,
        colours=MODEL_COLOURS,
        columns=["human", *(name for name, metrics in models.items() if metrics is not None)],
        groups=[(title, list(_rows(metrics, report))) for title, metrics in _GROUPS],
        figures=_figures(report, figures),
        examples_open=_EXAMPLES_OPEN,
    )


def _rows(metrics: Sequence[_Metric], report: Report) -> Iterator[tuple[_Metric, list[_Bucket]]]:
    for metric in metrics:
        human = getattr(report.human, metric.key) if metric.key in HumanMetrics.model_fields else None
        models: dict[str, ModelMetrics] = {"base": report.base, "adapter": report.adapter}
        if report.ce is not None:
            models = {"base": report.base, "ce": report.ce, "adapter": report.adapter}
        values: dict[str, float | None] = {name: getattr(one, metric.key) for name, one in models.items()}
        if any(value is not None for value in values.values()):
            best = _best(values, metric, human)
            cells = [_Bucket(column="human", text="" if human is None else metric.show(human), best=False)]
            for name, value in values.items():
                text = "" if value is None else metric.show(value)
                cells.append(_Bucket(column=name, text=text, best=text in best))
            yield metric, cells


def _best(values: dict[str, float | None], metric: _Metric, human: float | None) -> set[str]:
    """The best value as it is shown, so that two which read alike are both marked."""
    known = [value for value in values.values() if value is not None]
    if metric.better == "none" or (metric.better == "human" and human is None):
        return set()
    if metric.better == "human":
        nearest = min(abs(value - (human or 0)) for value in known)
        return {metric.show(value) for value in known if abs(value - (human or 0)) == nearest}
    return {metric.show(min(known) if metric.better == "low" else max(known))}


def _figures(report: Report, data: FigureData) -> list[_Figure]:
    return [
        _Figure(
            title="Training",
            caption="Loss of each training; thin lines are single steps, bold ones their running mean. Curves of"
            " different objectives differ in level by what their targets leave undecided.",
            description="Line chart: training loss over steps.",
            svg=training_svg(report.training),
        ),
        _Figure(
            title="Sentence lengths",
            caption="Share of sentences up to each length. The area between a curve and the human one is the"
            " distance in the table.",
            description="Line chart: cumulative distribution of sentence lengths, human and each model.",
            svg=sentence_lengths_svg(data.sentence_lengths),
        ),
        _Figure(
            title="Rank and frequency of words",
            caption="Each word’s share against its rank. A curve that ends early uses fewer different words.",
            description="Line chart with logarithmic axes: word frequency against rank, human and each model.",
            svg=rank_frequency_svg(data.rank_frequency),
        ),
        _Figure(
            title="Calibration",
            caption="On the dotted line, a token held to be 70 % likely is right 70 times in 100; below it the"
            " model is too sure. Bins of fewer than 10 tokens are left out.",
            description="Line chart: share of right first guesses against the model’s confidence.",
            svg=calibration_svg(data.reliability),
        ),
    ]


def _yaml(settings: dict[str, object]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _number(value: float) -> str:
    """At most four significant digits, thousands set apart."""
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else _number(value)


def _change(difference: NllDifference) -> str:
    """`0.432 ± 0.021 below`, or that the two cannot be told apart."""
    size, error = abs(difference.difference_nats), difference.standard_error_nats
    side = "below" if difference.difference_nats < 0 else "above"
    if error is None:
        return f"{size:.3f} {side}"
    return f"{size:.3f} ± {error:.3f} {side}"
