"""Scores and samples of several models to the numbers and figures that stand side by side in the report.

In: hold-out scores, samples and the human continuations of the same beginnings. Out: records of the report and the data
of its figures. Human and model continuations are cut at the same number of tokens and measured by the same rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from softshard.evaluate.plots import FigureData
from softshard.evaluate.report import Example, HumanMetrics, ModelMetrics, NllDifference
from softshard.evaluate.samples import Continuations, Prompt, Samples
from softshard.evaluate.scoring import HoldoutScores
from softshard.evaluate.text_metrics import (
    distinct_n,
    mattr,
    rank_frequency,
    sentence_length_w1,
    sentence_lengths,
    split_words,
    token_l2,
)
from softshard.models import Tokenizer

__all__ = ["figure_data", "human_metrics", "model_metrics", "nll_difference", "pick_examples"]


def human_metrics(human: Continuations) -> HumanMetrics:
    """What the human continuations measure. See `model_metrics` for how texts are put together."""
    words = [split_words(text) for text in human.texts]
    return HumanMetrics(
        mattr=mattr(list(itertools.chain.from_iterable(words))),
        distinct_2=distinct_n(words, n=2),
        distinct_3=distinct_n(words, n=3),
        mean_sentence_words=_mean(_sentences(human)),
        mean_sample_tokens=_mean([len(ids) for ids in human.token_ids]),
    )


def model_metrics(
    scores: HoldoutScores,
    samples: Samples,
    *,
    human: Continuations,
    vocab_size: int,
    retention_nll_nats: float | None,
) -> ModelMetrics:
    """One model's column of the table.

    For the type-token ratio the continuations are joined in the order of their prompts, so that short ones count too;
    sentences and n-grams end where a continuation does.
    """
    continuations = samples.continuations
    words = [split_words(text) for text in continuations.texts]
    return ModelMetrics(
        human_nll_nats=scores.human_nll_nats,
        bits_per_byte=scores.bits_per_byte,
        kl_to_teacher_nats=scores.kl_to_teacher_nats,
        ece=scores.ece,
        accuracy=scores.accuracy,
        mean_entropy_nats=scores.mean_entropy_nats,
        mattr=mattr(list(itertools.chain.from_iterable(words))),
        distinct_2=distinct_n(words, n=2),
        distinct_3=distinct_n(words, n=3),
        sentence_length_w1=sentence_length_w1(_sentences(continuations), _sentences(human)),
        token_l2=token_l2(continuations.token_ids, human.token_ids, vocab_size=vocab_size),
        mean_sentence_words=_mean(_sentences(continuations)),
        mean_sample_tokens=_mean([len(ids) for ids in continuations.token_ids]),
        retention_nll_nats=retention_nll_nats,
        ms_per_token=samples.ms_per_token,
    )


def nll_difference(first: HoldoutScores, second: HoldoutScores) -> NllDifference:
    """First minus second, of two models on the same hold-out, paired by document.

    The standard error is that of a ratio of sums over documents (linearised, Cochran, 1977): with d_g and n_g the
    difference and the labels of document g, r = sum d_g / sum n_g, it is
    sqrt(G / (G - 1) * sum (d_g - r n_g)^2) / sum n_g.
    """
    pairs = [
        (one.nll_nats - second.documents[document].nll_nats, one.num_labels)
        for document, one in first.documents.items()
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
    """Every beginning with all that followed, in the order of the prompts."""
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


def figure_data(
    *, human: Continuations, scores: Mapping[str, HoldoutScores], samples: Mapping[str, Samples]
) -> FigureData:
    """Data of the figures; the keys of both mappings are `base`, `ce` where there is one, and `adapter`."""
    texts = {"human": human} | {name: one.continuations for name, one in samples.items()}
    return FigureData(
        sentence_lengths={name: tuple(_sentences(one)) for name, one in texts.items()},
        rank_frequency={
            name: tuple(rank_frequency(itertools.chain.from_iterable(split_words(text) for text in one.texts)))
            for name, one in texts.items()
        },
        reliability={name: one.reliability for name, one in scores.items()},
    )


def _sentences(continuations: Continuations) -> list[int]:
    return [length for text in continuations.texts for length in sentence_lengths(text)]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
