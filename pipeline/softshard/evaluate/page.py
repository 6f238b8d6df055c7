"""The report as one self-contained HTML page.

In: the record of an evaluation and the data of its plots. Out: HTML that fetches nothing. All text from a corpus, a
model or a job file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from softshard.config import Job
from softshard.evaluate.metrics import GROUPS, METRICS, Metric
from softshard.evaluate.plots import MODEL_COLOURS, MODEL_NAMES, PLOTS, PlotData
from softshard.evaluate.report import NllDifference, Report

__all__ = ["render_page"]

_EXAMPLES_OPEN = 4
_ORDER = ("low", "high", "human", "none")
"""Order of a group's metrics on the page, by which value is best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One cell of the comparison."""

    column: str
    text: str
    best: bool


def render_page(report: Report, *, plot_data: PlotData) -> str:
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
    return environment.get_template("report.html").render(
        report=report,
        job=Job.model_validate(report.settings),
        settings=_yaml(report.settings),
        names=MODEL_NAMES,
        colours=MODEL_COLOURS,
        columns=["human", *report.models],
        groups=[(group, list(_rows(group, report))) for group in GROUPS],
        plots=[(plot, plot.draw(report, plot_data)) for plot in PLOTS],
        examples_open=_EXAMPLES_OPEN,
    )


def _rows(group: str, report: Report) -> Iterator[tuple[Metric, list[_Cell]]]:
    """Metrics of one group, with the cells of their rows; a metric that no model has is left out."""
    metrics = [metric for metric in METRICS if metric.group == group]
    for metric in sorted(metrics, key=lambda metric: _ORDER.index(metric.better)):
        human = getattr(report.human, metric.key) if metric.from_text is not None else None
        values: dict[str, float | None] = {name: getattr(model, metric.key) for name, model in report.models.items()}
        if any(value is not None for value in values.values()):
            best = _best(values, metric, human)
            cells = [_Cell(column="human", text="" if human is None else metric.shown(human), best=False)]
            for name, value in values.items():
                text = "" if value is None else metric.shown(value)
                cells.append(_Cell(column=name, text=text, best=text in best))
            yield metric, cells


def _best(values: dict[str, float | None], metric: Metric, human: float | None) -> set[str]:
    """The best value as the page shows it, so that values which look the same are marked alike."""
    known = [value for value in values.values() if value is not None]
    if metric.better == "none" or (metric.better == "human" and human is None):
        return set()
    if metric.better == "human":
        nearest = min(abs(value - (human or 0)) for value in known)
        return {metric.shown(value) for value in known if abs(value - (human or 0)) == nearest}
    return {metric.shown(min(known) if metric.better == "low" else max(known))}


def _yaml(settings: dict[str, object]) -> str:
    import yaml

    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _number(value: float) -> str:
    """At most four significant digits, with separators between thousands."""
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else _number(value)


def _change(difference: NllDifference) -> str:
    """Size, standard error and direction: `0.432 ± 0.021 below`."""
    size, error = abs(difference.difference_nats), difference.standard_error_nats
    side = "below" if difference.difference_nats < 0 else "above"
    if error is None:
        return f"{size:.3f} {side}"
    return f"{size:.3f} ± {error:.3f} {side}"
