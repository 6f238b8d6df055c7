"""What does a student lose when it is trained on sketches of its teacher's distributions instead of the whole ones?

Teacher: SmolLM2-135M-Instruct on speeches. Student: the teacher's first 24 layers, frozen; a linear map in place of the
last six layers, initialised to the least-squares fit to the teacher's last hidden states on separate text; a gated
layer beside it, initialised to zero; the teacher's output matrix, frozen as in adapter training. Students of one seed
start from the same weights and see the same positions in the same order; only their targets differ. The learning rate
is the best of 5e-5, 1e-4, 2e-4 and 4e-4 for the student of the full distribution.

Two regimes: every position once; few positions many times, where a student can memorise noise that does not change.
Measured on other speeches, as means over positions: KL(teacher || student) in nats, and the rare mass, which is the
probability of all tokens outside the teacher's 2,000 most likely ones at that position. Differences are paired by seed;
their standard error is over seeds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Options, Result, middle_states, positions, require, say, say_table
from benchmarks.student.students import BATCH_POSITIONS, LEARNING_RATE, Student, StudyData, batches, divergence, train
from benchmarks.student.targets import TAU, MakeTarget, Target, TargetKind, full, multinomial, threshold, topk
from softshard.config import ThresholdSketch
from softshard.sketch.codec import MASS_GRID

_FROZEN_LAYERS = 24
_MOST_LIKELY = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    num_start: int
    num_train: int
    """Positions of the first regime, and on to the end of the speech."""
    num_held_out: int
    """Positions after these, less the rest of that speech."""
    num_few: int
    """Positions of the second regime, the first of the others."""
    epochs: int
    num_seeds: int


_FULL_RUN = Size(num_start=12_000, num_train=16_000, num_held_out=3_500, num_few=512, epochs=16, num_seeds=3)
_QUICK_RUN = Size(num_start=1_200, num_train=600, num_held_out=300, num_few=128, epochs=3, num_seeds=1)

_ONCE: Mapping[str, TargetKind] = {
    "full": TargetKind(full),
    "threshold_24": TargetKind(threshold),
    "multinomial_25": TargetKind(multinomial(25)),
    "multinomial_50": TargetKind(multinomial(50)),
    "multinomial_100": TargetKind(multinomial(100)),
    "topk_64": TargetKind(topk(64, ghost=False)),
    "topk_64_ghost": TargetKind(topk(64, ghost=True)),
}


def _again(epochs: int) -> dict[str, TargetKind]:
    """Lessons of the second regime: one draw for all epochs, four that take turns, one for each."""
    return {
        "full_reused": TargetKind(full),
        "threshold_24_reused": TargetKind(threshold),
        "threshold_24_draws_4": TargetKind(threshold, num_draws=4),
        "threshold_24_fresh": TargetKind(threshold, num_draws=epochs),
        "multinomial_50_reused": TargetKind(multinomial(50)),
        "multinomial_50_fresh": TargetKind(multinomial(50), num_draws=epochs),
        "topk_64_reused": TargetKind(topk(64, ghost=False)),
    }


def open_study_data(size: Size, options: Options) -> StudyData:
    num_positions = size.num_start + size.num_train + size.num_held_out
    teacher = positions("small", num_positions=num_positions, cache=options.cache)
    frozen = middle_states("small", layer=_FROZEN_LAYERS, num_positions=num_positions, cache=options.cache)
    end_train = 0
    for sequence in teacher.sequences:
        if sequence.start == 0 and end_train >= size.num_start + size.num_train:
            break
        end_train += sequence.num_labels
    require(end_train < num_positions, "there are held-out speeches")
    known = frozen[: size.num_start]
    return StudyData(
        teacher=teacher,
        inputs=(frozen - known.mean(0)) / known.std(0),
        num_start=size.num_start,
        end_train=end_train,
    )


def held_out(data: StudyData, students: Mapping[str, Student]) -> dict[str, dict[str, float]]:
    """`kl` and `rare_mass` of each student, and the teacher's own `rare_mass`."""
    rows = torch.arange(data.end_train, len(data.inputs))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("teacher", *students)}
    with torch.inference_mode():
        for some in rows.split(BATCH_POSITIONS):
            given = torch.log_softmax(data.logits(some), 1)
            expected = given.exp()
            rare = torch.ones_like(given).scatter_(1, given.topk(_MOST_LIKELY, 1, sorted=False).indices, 0.0)
            sums["teacher"][1] += (expected * rare).sum()
            for name, student in students.items():
                learnt = torch.log_softmax(student(data.inputs[some]) @ data.teacher.output.T, 1)
                sums[name][0] += (expected * (given - learnt)).sum()
                sums[name][1] += (learnt.exp() * rare).sum()
    means = {name: (total / len(rows)).tolist() for name, total in sums.items()}
    return {name: {"kl": kl, "rare_mass": rare_mass} for name, (kl, rare_mass) in means.items()}


_CHECKED_ROWS = 16
_CHECKED_DRAWS = 200


def check_losses(data: StudyData) -> None:
    """Loss and slope of each kind of target against float64 and the dense distribution."""
    _, batch = next(batches(data, num_rows=data.num_train, epochs=1, num_draws=1, seed=0))
    hidden = Student(data, seed=0)(data.inputs[batch.rows]).detach().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logprobs = torch.log_softmax(exact @ data.teacher.output.double().T, 1)
    kinds: dict[str, MakeTarget] = {
        "full": full,
        "threshold": threshold,
        "top 64": topk(64, ghost=False),
        "top 64 with a ghost": topk(64, ghost=True),
    }
    for name, make in kinds.items():
        target = make(batch, 0)
        ours = divergence(data.teacher, hidden, batch.rows, target)
        theirs = _dense_divergence(logprobs, batch.logits, target)
        (slope,), (right,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(theirs, exact, retain_graph=True)
        off = abs(ours.item() / theirs.item() - 1)
        turned = float((slope - right).norm() / right.norm())
        require(max(off, turned) < 1e-4, f"loss and slope of {name} against float64: off by {off:.0e}, {turned:.0e}")


def _dense_divergence(logprobs: Tensor, logits: Tensor, target: Target | None) -> Tensor:
    if target is None:
        expected = torch.softmax(logits.double(), 1)
        return (expected * (expected.log() - logprobs)).sum()
    weights = target.dense(vocab_size=logits.shape[1])
    loss = -(weights * logprobs).sum()
    if target.ghost_mass is not None:
        outside = (logprobs.exp() * (weights == 0)).sum(1)
        loss = loss - target.ghost_mass.double() @ outside.log()
    return loss


def check_targets(data: StudyData) -> None:
    """The mean of many draws comes as near to the teacher's distribution as the kind's own variance says.

    A token of probability p that is drawn as one of n tokens has variance p (1 - p) / n, one that threshold sampling
    takes with probability p / tau and weight tau has p (tau - p). What the codec rounds is allowed for besides.
    """
    _, batch = next(batches(data, num_rows=data.num_train, epochs=1, num_draws=_CHECKED_DRAWS, seed=1))
    batch = batch.first(_CHECKED_ROWS)
    exact = torch.softmax(batch.logits.double(), 1)
    rare = torch.ones_like(exact).scatter_(1, exact.topk(_MOST_LIKELY, 1).indices, 0.0)
    head = exact * (exact >= TAU)
    tail = exact - head
    rounding = float(head.square().sum()) * math.expm1(ThresholdSketch().step) ** 2 + _CHECKED_ROWS * MASS_GRID**2
    for name, make, variance, allowed in (
        ("threshold", threshold, float((tail * (TAU - tail)).sum()), rounding),
        ("multinomial 50", multinomial(50), float((exact * (1 - exact)).sum()) / 50, 0.0),
    ):
        total, rare_mass = torch.zeros_like(exact), []
        for draw in range(_CHECKED_DRAWS):
            target = make(batch, draw)
            assert target is not None
            dense = target.dense(vocab_size=exact.shape[1])
            total += dense
            rare_mass.append(float((dense * rare).sum()))
        error = float((total / _CHECKED_DRAWS - exact).square().sum())
        bound = 1.5 * variance / _CHECKED_DRAWS + allowed
        require(error < bound, f"{_CHECKED_DRAWS} draws of {name} average to the teacher: {error:.1e} < {bound:.1e}")
        off = abs(statistics.mean(rare_mass) - float((exact * rare).sum()))
        bound = 5 * statistics.stdev(rare_mass) / _CHECKED_DRAWS**0.5
        require(off < bound, f"so does their rare mass: {off:.1e} < {bound:.1e}")


def measure(options: Options) -> Result:
    size = _QUICK_RUN if options.quick else _FULL_RUN
    data = open_study_data(size, options)
    check_losses(data)
    check_targets(data)
    seeds = [_one_seed(data, size, seed) for seed in range(size.num_seeds)]
    figures = {
        f"{name}_{what}": round(statistics.mean(measured[name][what] for measured in seeds), 6)
        for name in seeds[0]
        for what in seeds[0][name]
        if (name, what) != ("teacher", "kl")
    }
    rows = [*_rows(seeds, list(_ONCE), "full"), *_rows(seeds, list(_again(size.epochs)), "full_reused")]
    _say_rows(rows)
    say(f"rare mass of the teacher {figures['teacher_rare_mass']:.5f}; KL at the start {figures['untrained_kl']:.4f}")
    details = {
        "size": asdict(size),
        "num_train_positions": data.num_train,
        "num_held_out_positions": len(data.inputs) - data.end_train,
        "frozen_layers": _FROZEN_LAYERS,
        "batch_positions": BATCH_POSITIONS,
        "learning_rate": LEARNING_RATE,
        "most_likely_tokens": _MOST_LIKELY,
        "compared": rows,
        "by_seed": seeds,
    }
    return Result(figures=figures, details=details)


def _one_seed(data: StudyData, size: Size, seed: int) -> dict[str, dict[str, float]]:
    started = time.monotonic()
    students = {"untrained": Student(data, seed=seed)}
    students |= train(data, _ONCE, num_rows=data.num_train, epochs=1, seed=seed)
    students |= train(data, _again(size.epochs), num_rows=size.num_few, epochs=size.epochs, seed=seed)
    measured = held_out(data, students)
    say(f"seed {seed}: {len(students) - 1} students trained and measured in {time.monotonic() - started:.0f} s")
    return measured


def _rows(seeds: Sequence[Mapping[str, Mapping[str, float]]], names: Sequence[str], full: str) -> list[dict[str, Any]]:
    """Each student beside the full distribution's: mean over seeds, and its standard error where there are several."""

    def compared(values: list[float]) -> dict[str, float | None]:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return {"mean": statistics.mean(values), "standard_error": error}

    return [
        {
            "student": name,
            "kl": statistics.mean(one[name]["kl"] for one in seeds),
            "rare_mass": statistics.mean(one[name]["rare_mass"] for one in seeds),
            "kl_over_full": compared([one[name]["kl"] - one[full]["kl"] for one in seeds]),
            "rare_mass_of_full": compared([one[name]["rare_mass"] / one[full]["rare_mass"] for one in seeds]),
        }
        for name in names
    ]


def _say_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    def with_error(value: Mapping[str, float | None], digits: int, scale: float = 1.0) -> str:
        mean, error = value["mean"], value["standard_error"]
        assert mean is not None
        return f"{scale * mean:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")

    say_table(
        ("student", "KL", "over full", "rare mass", "% of full's"),
        [
            (
                row["student"],
                f"{row['kl']:.4f}",
                with_error(row["kl_over_full"], 4),
                f"{row['rare_mass']:.5f}",
                with_error(row["rare_mass_of_full"], 1, 100.0),
            )
            for row in rows
        ],
    )
