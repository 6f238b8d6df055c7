"""The ways of storing a target: which entries, in how many bytes, and which distribution a reader decodes.

In: positions under a model. Out: for each form a part of all positions, as a run commits it, and the targets
decoded from it; for each way of reading a form, sparse distributions, and what is known about their expectation.

All forms have the same columns. Multinomial sampling of n tokens (as in Sparse Logit Sampling, ACL 2025), whose weights
are count / n, is stored in the cheaper of the two layouts that the columns allow: a token drawn once is an entry of the
tail and weighs 1/n, so that no value is stored for it; one drawn more often belongs to the head. Its steps are at most
1.5/n nats, which is fine enough for a reader who knows n to get every count back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import Positions, require
from softshard.config import NucleusSketch, SketchSettings, ThresholdSketch, TopkSketch
from softshard.shard.commit import PartSpec, build_part
from softshard.shard.decode import decode_part
from softshard.sketch.entries import Entries, entries_of
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.join import concatenate, split_rows
from softshard.sketch.reduce import sketch_rows, stored_entries
from softshard.sketch.types import SequenceTargets

__all__ = ["CHUNK", "Form", "Part", "Reading", "Way", "all_ways", "read_renormalised", "stored_parts"]

CHUNK = 256
"""Rows whose dense distributions are held at a time."""
_MOST_COUNT_STEP = 0.05

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is stored of each target."""

    settings: SketchSettings
    num_samples: int | None = None
    """Tokens that multinomial sampling draws; None for the kinds of softshard."""

    @property
    def tau(self) -> float | None:
        """Weight of a tail entry."""
        return self.settings.tail_weight

    @property
    def draws(self) -> int:
        """Independent tails."""
        return self.settings.num_draws

    def noise(self, source: Positions) -> FloatArray:
        """[draws, N] in [0, 1): those of a run with seed 0; for multinomial sampling, streams of its own."""
        if self.num_samples is not None:
            return source.uniforms(seed=self.num_samples, num_draws=self.num_samples)
        return source.uniforms(seed=0, num_draws=self.draws)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """N distributions as a reader has them, and how they vary from draw to draw."""

    entries: Entries
    spread: FloatArray
    """[N] mass that lies evenly on the tokens without an entry."""
    certain: NDArray[np.bool_]
    """[E] entries that are the same in every draw."""
    variance: Callable[[FloatArray, FloatArray], FloatArray] | None
    """Sum over tokens of the variance, from the mass and the sum of squares of all targets without their certain
    entries, [N] each; in expectation those parts are exact. None where nothing is drawn."""

    def dense(self, num_rows: int, *, vocab_size: int) -> FloatArray:
        """[rows, V] the first distributions in full."""
        rows, ids, weights, even = self.part_of(slice(0, num_rows), vocab_size)
        full = np.repeat(even[:, None], vocab_size, axis=1)
        full[rows, ids] = weights
        return full

    def sum_of(self, here: slice, *, vocab_size: int) -> FloatArray:
        """[V] sum of some distributions."""
        rows, ids, weights, even = self.part_of(here, vocab_size)
        total = np.bincount(ids, weights=weights - even[rows], minlength=vocab_size).astype(np.float64)
        return total + float(even.sum())

    def part_of(
        self, here: slice, vocab_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], FloatArray, FloatArray]:
        """Rows, ids and weights of the entries of some distributions, and what lies on each token without one."""
        offsets = self.entries.offsets[here.start : here.stop + 1]
        there, counts = slice(offsets[0], offsets[-1]), np.diff(offsets)
        weights = self.entries.weights[there].astype(np.float64)
        even = self.spread[here] / (vocab_size - counts)
        return np.repeat(np.arange(len(counts)), counts), self.entries.ids[there], weights, even


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A form and how it is read."""

    family: str
    mark: str
    """Which of the family."""
    form: Form
    read: Callable[[SequenceTargets, Form], Reading]

    @property
    def title(self) -> str:
        return f"{self.family} {self.mark}"


def read_threshold(targets: SequenceTargets, form: Form) -> Reading:
    """The first draw: the head is certain, of the tail each token i is drawn with probability p_i / tau."""
    tau = form.tau
    assert tau is not None
    entries = entries_of(targets, tau=tau)
    counts = np.diff(entries.offsets)
    within = np.arange(len(entries.ids)) - np.repeat(entries.offsets[:-1], counts)
    return Reading(
        entries=entries,
        spread=np.zeros(targets.num_labels),
        certain=within < np.repeat(targets.head_count, counts),
        variance=lambda mass, squares: tau * mass - squares,
    )


def read_multinomial(targets: SequenceTargets, form: Form) -> Reading:
    """Counts over n. The number of tail entries tells the head's mass, and that what every count was."""
    n = form.num_samples
    assert n is not None
    exact = replace(targets, tail_mass=(targets.tail_count / n).astype(np.float32))
    entries = entries_of(exact, tau=1 / n)
    counts = np.rint(entries.weights.astype(np.float64) * n)
    return Reading(
        entries=replace(entries, weights=(counts / n).astype(np.float32)),
        spread=np.zeros(targets.num_labels),
        certain=np.zeros(len(counts), dtype=np.bool_),
        variance=lambda mass, squares: (mass - squares) / n,
    )


def read_renormalised(targets: SequenceTargets, form: Form) -> Reading:
    """A head that is scaled to 1."""
    return _read_head(replace(targets, tail_mass=np.zeros_like(targets.tail_mass)), targets.num_labels * [0.0])


def read_ghost(targets: SequenceTargets, form: Form) -> Reading:
    """A head of its exact mass; the ghost token's is spread as a uniform student spreads it."""
    return _read_head(targets, targets.tail_mass)


def _read_head(targets: SequenceTargets, spread: Sequence[float] | NDArray[np.float32]) -> Reading:
    entries = entries_of(targets, tau=None)
    return Reading(
        entries=entries,
        spread=np.array(spread, dtype=np.float64),
        certain=np.ones(len(entries.ids), dtype=np.bool_),
        variance=None,
    )


def all_ways(*, quick: bool) -> list[Way]:
    """Every way that is compared; the quick ones are some of them."""
    ways = []
    for parts in (12, 24, 50) if quick else (8, 12, 16, 24, 32, 50, 100):
        form = Form(settings=ThresholdSketch(tau=1 / parts))
        ways.append(Way(family="threshold", mark=f"1/{parts}", form=form, read=read_threshold))
    form = Form(settings=ThresholdSketch(tau=1 / 24, draws=4))
    ways.append(Way(family="threshold", mark="1/24, 4 draws", form=form, read=read_threshold))
    for n in (25, 50, 100) if quick else (12, 25, 50, 100, 200):
        settings = ThresholdSketch(tau=1 / n, step=min(_MOST_COUNT_STEP, 1.5 / n))
        form = Form(settings=settings, num_samples=n)
        ways.append(Way(family="multinomial", mark=f"{n}", form=form, read=read_multinomial))
    topk = {k: Form(settings=TopkSketch(kind="topk", k=k)) for k in ((16, 64) if quick else (16, 32, 64, 128, 256))}
    for family, read in (("top-k renormalised", read_renormalised), ("top-k with ghost", read_ghost)):
        ways += [Way(family=family, mark=f"{k}", form=form, read=read) for k, form in topk.items()]
    for mass in (0.95,) if quick else (0.9, 0.95):
        form = Form(settings=NucleusSketch(kind="nucleus", mass=mass, max_entries=512))
        ways.append(Way(family="nucleus", mark=f"{mass:.2f}", form=form, read=read_renormalised))
    return ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of all positions, and what came back from it."""

    num_bytes: int
    targets: SequenceTargets
    """Decoded."""
    fidelity: FidelitySums
    """As it was measured at capture; nothing but the number of labels for multinomial sampling."""

    @property
    def num_entries(self) -> int:
        """Of all positions and draws."""
        return len(self.targets.head_ids) + len(self.targets.tail_ids)


def stored_parts(source: Positions, forms: Sequence[Form]) -> list[Part]:
    """A part for each form, decoded and checked. Raises WrongAnswer."""
    noise = [form.noise(source) for form in forms]
    pieces: list[list[SequenceTargets]] = [[] for _ in forms]
    sums = [FidelitySums() for _ in forms]
    for start in range(0, len(source.states), CHUNK):
        rows = _Rows(source, start)
        for number, form in enumerate(forms):
            targets, fidelity = rows.stored(form, noise[number])
            pieces[number].append(targets)
            sums[number] += fidelity
    given = [concatenate(piece) for piece in pieces]
    parts = [_part(source, *one) for one in zip(forms, given, sums, strict=True)]
    same = all(_comes_back(*one) for one in zip(forms, given, parts, strict=True))
    require(same, f"every entry comes back from {len(forms)} parts, ids and weights")
    return parts


class _Rows:
    """Some rows, whose logits and running sums serve all forms."""

    def __init__(self, source: Positions, start: int) -> None:
        self._source = source
        self._slice = slice(start, min(start + CHUNK, len(source.states)))
        self._logits = source.logits(self._slice.start, self._slice.stop)

    @cached_property
    def _running(self) -> Tensor:
        """[n, V] float64 running sums of the probabilities."""
        return torch.softmax(self._logits, 1).cumsum(1, dtype=torch.float64)

    def stored(self, form: Form, noise: FloatArray) -> tuple[SequenceTargets, FidelitySums]:
        targets, fidelity = sketch_rows(
            self._logits,
            labels=self._source.labels[self._slice],
            uniforms=np.ascontiguousarray(noise[: form.draws, self._slice]),
            settings=form.settings,
            vocab_size=self._source.vocab_size,
            places=self._source.places[self._slice],
        )
        if form.num_samples is None:
            return targets, fidelity
        sample = _sample(self._running, torch.from_numpy(np.ascontiguousarray(noise[:, self._slice].T)))
        return _with_counts(targets, sample), FidelitySums(num_labels=targets.num_labels)


def _sample(running: Tensor, uniforms: Tensor) -> NDArray[np.int64]:
    """[rows, n] ids drawn independently, by [rows, n] uniform numbers."""
    ids = torch.searchsorted(running, uniforms * running[:, -1:], right=True)
    drawn: NDArray[np.int64] = ids.clamp_(max=running.shape[1] - 1).numpy()
    return drawn


def _with_counts(targets: SequenceTargets, sample: NDArray[np.int64]) -> SequenceTargets:
    """The per-label values of some targets, with the [rows, n] ids of a sample as their entries."""
    rows, n = sample.shape
    keys, counts = np.unique(sample | np.arange(rows)[:, None] << 32, return_counts=True)
    labels, ids = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
    again = counts > 1
    order = np.lexsort((ids[again], -counts[again], labels[again]))
    singles = np.bincount(labels[~again], minlength=rows)
    return replace(
        targets,
        tail_mass=(singles / n).astype(np.float32),
        head_count=np.bincount(labels[again], minlength=rows).astype(np.int32),
        tail_count=singles.astype(np.int32),
        head_ids=ids[again][order],
        head_logprobs=np.log(counts[again][order] / n).astype(np.float32),
        tail_ids=ids[~again],
    )


def _part(source: Positions, form: Form, targets: SequenceTargets, fidelity: FidelitySums) -> Part:
    plan = PartSpec(
        index=0,
        split="train",
        fold=-1,
        slice="0" * 64,
        tokenizer_fingerprint="0" * 64,
        vocab_size=source.vocab_size,
        teacher={"engine": "transformers", "num_threads": 1},
        sketch=form.settings,
        seed=0,
    )
    windows = split_rows(targets, [sequence.num_labels for sequence in source.sequences])
    content, _ = build_part(plan, list(zip(source.sequences, windows, strict=True)), fidelity)
    decoded = concatenate([targets for _, targets in decode_part(content, uri="part")[0]])
    return Part(num_bytes=len(content), targets=decoded, fidelity=fidelity)


def _comes_back(form: Form, given: SequenceTargets, part: Part) -> bool:
    """Whether a reader has the entries that were given: rounded, in every draw; the counts themselves of a sample."""
    draws = range(given.draws)
    rounded = [stored_entries(given, form.settings, draw=draw) for draw in draws]
    back = [entries_of(part.targets, tau=form.tau, draw=draw) for draw in draws]
    same = all(_same(*pair) for pair in zip(rounded, back, strict=True))
    if form.num_samples is not None:
        same &= _same(entries_of(given, tau=form.tau), read_multinomial(part.targets, form).entries)
    return same


def _same(given: Entries, back: Entries) -> bool:
    if not np.array_equal(given.offsets, back.offsets):
        return False
    labels = np.repeat(np.arange(len(given.offsets) - 1), np.diff(given.offsets))
    first, second = (np.lexsort((entries.ids, labels)) for entries in (given, back))
    return np.array_equal(given.ids[first], back.ids[second]) and np.allclose(
        given.weights[first], back.weights[second], rtol=1e-5, atol=0
    )
