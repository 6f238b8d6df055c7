"""Scores and samples of several models to the metrics and plot data of the report.

In: hold-out scores, samples, and the human continuations of the same beginnings. Out: records of the report and data
for its plots. Human and model continuations are cut at the same number of tokens and measured by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from softshard.evaluate.metrics import METRICS, HumanMetrics, Measured, ModelMetrics, Writing
from softshard.evaluate.plots import PlotData
from softshard.evaluate.report import Example, NllDifference
from softshard.evaluate.samples import Continuations, Prompt, Samples
from softshard.evaluate.scoring import HoldoutScores
from softshard.evaluate.text_metrics import rank_frequency
from softshard.models import Tokenizer

__all__ = ["human_metrics", "model_metrics", "nll_difference", "pick_examples", "plot_data"]


def human_metrics(human: Continuations) -> HumanMetrics:
    """The metrics that human writing has too."""
    text = Writing(human)
    return HumanMetrics(**{metric.key: metric.from_text(text) for metric in METRICS if metric.from_text is not None})


def model_metrics(
    scores: HoldoutScores,
    samples: Samples,
    *,
    human: Continuations,
    vocab_size: int,
    retention_nll_nats: float | None,
) -> ModelMetrics:
    """One model's column of the table."""
    measured = Measured(
        scores=scores,
        samples=samples,
        text=Writing(samples.continuations),
        human=Writing(human),
        vocab_size=vocab_size,
        retention_nll_nats=retention_nll_nats,
    )
    return ModelMetrics.model_validate({metric.key: metric.measure(measured) for metric in METRICS})


def nll_difference(first: HoldoutScores, second: HoldoutScores) -> NllDifference:
    """First minus second, of two models on the same hold-out, paired by document.

    The standard error is that of a ratio of sums over documents (linearised, Cochran, 1977): with d_g and n_g the
    difference and the labels of document g, r = sum d_g / sum n_g, it is
    sqrt(G / (G - 1) * sum (d_g - r n_g)^2) / sum n_g.
    """
    pairs = [
        (document.nll_nats - second.documents[document_id].nll_nats, document.num_labels)
        for document_id, document in first.documents.items()
    ]
    labels = sum(count for _, count in pairs)
    ratio = math.fsum(difference for difference, _ in pairs) / labels
    squares = math.fsum((difference - ratio * count) ** 2 for difference, count in pairs)
    groups = len(pairs)
    error = math.sqrt(groups / (groups - 1) * squares) / labels if groups > 1 else None
    return NllDifference(difference_nats=ratio, standard_error_nats=error)


def pick_examples(
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer,
    human: Continuations,
    base: Samples,
    ce: Samples | None,
    adapter: Samples,
) -> tuple[Example, ...]:
    """Each beginning with the human continuation and those of all models, in the order of the prompts."""
    return tuple(
        Example(
            prompt=tokenizer.decode([token for token in prompt.token_ids if token != tokenizer.bos_id]),
            human=human.texts[index],
            base=base.continuations.texts[index],
            ce=None if ce is None else ce.continuations.texts[index],
            adapter=adapter.continuations.texts[index],
        )
        for index, prompt in enumerate(prompts)
    )


def plot_data(*, human: Continuations, scores: Mapping[str, HoldoutScores], samples: Mapping[str, Samples]) -> PlotData:
    """Data of the plots; the keys of both mappings are `base`, `ce` where there is a baseline, and `adapter`."""
    texts = {"human": Writing(human)} | {name: Writing(drawn.continuations) for name, drawn in samples.items()}
    return PlotData(
        sentence_lengths={name: tuple(text.sentence_lengths) for name, text in texts.items()},
        rank_frequency={name: tuple(rank_frequency(text.joined_words)) for name, text in texts.items()},
        reliability={name: model.reliability for name, model in scores.items()},
    )
