"""Does distribution fine-tuning bring a model nearer to human writing than well-tuned ordinary fine-tuning?

A literary and a conversational text; a student as large as the teacher (the same 30 layers, a light adapter on the last
ten), and one with twelve of its layers. For each: the base; cross-entropy at its best learning rate; label smoothing;
GEM; and distribution fine-tuning (DFT) over alpha, over two and four folds and the mean of both teachers, and with the
unadapted base as teacher. Every training has the same text and the same number of epochs; the weights after its best
epoch on one half of the hold-out are kept. Settings are chosen on that half, with one seed. At most four finalists are
then trained with three seeds and measured on the other half: the loss on human tokens, the calibration error, and the
metrics of continuations. Differences are paired by document; their intervals come from resampling documents and seeds.

A full run can be stopped at any time and resumes: finished trials are lines of `results/dft.trials.jsonl`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, Options, Result, say, say_table
from benchmarks.training.other_losses import check_other_losses
from benchmarks.training.texts import Size, open_scored_text
from benchmarks.training.trials import Records, Student, Trial, TrialGroup

_RECORDS = RESULTS / "dft.trials.jsonl"
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    size: Size
    courses: tuple[str, ...]
    students: tuple[Student, ...]
    learning_rates: Mapping[str, tuple[float, ...]]
    """By student; where the highest is the best, higher ones follow."""
    smoothing: tuple[float, ...]
    gem: tuple[tuple[str, float], ...]
    alphas: tuple[float, ...]
    teachers: tuple[str, ...]
    """Of DFT, besides `k2`, tried at the best alpha."""
    seeds: int


_FULL = Plan(
    size=Size(num_documents=48, document_characters=2_400, teacher_epochs=2, epochs=3),
    courses=("literary", "conversational"),
    students=("same", "smaller"),
    learning_rates={"same": (5e-4, 1e-3, 2e-3), "smaller": (1e-3, 2e-3, 4e-3)},
    smoothing=(0.05, 0.1),
    gem=(("gem_linear", 0.7), ("gem_logsigmoid", 0.7)),
    alphas=(0.0, 0.25, 0.5, 0.75),
    teachers=("k4", "k2+k4", "base"),
    seeds=3,
)
_QUICK = Plan(
    size=Size(num_documents=8, document_characters=300, teacher_epochs=1, epochs=1),
    courses=("literary",),
    students=("same",),
    learning_rates={"same": (1e-3,)},
    smoothing=(0.1,),
    gem=(("gem_linear", 0.7),),
    alphas=(0.5,),
    teachers=(),
    seeds=1,
)


def tuned(group: TrialGroup, plan: Plan) -> dict[str, Trial]:
    """Finalists by name, each the best of its kind on one seed, by the first half of the hold-out."""

    def best(trials: Iterable[Trial]) -> Trial:
        return min(trials, key=lambda trial: min(group.result(trial)["dev_nll"]))

    def at_best_rate(trial: Trial) -> Trial:
        """At the best of the plan's rates, and of its highest doubled as long as that does better; one rate is kept."""
        rates = list(plan.learning_rates[group.student])
        while True:
            found = best(replace(trial, learning_rate=rate) for rate in rates)
            if len(rates) == 1 or found.learning_rate < max(rates):
                return found
            rates.append(2 * max(rates))

    ce = at_best_rate(Trial(method="ce"))
    rate = ce.learning_rate
    rivals = [Trial(method="smoothing", strength=epsilon, learning_rate=rate) for epsilon in plan.smoothing]
    rivals += [Trial(method=name, strength=beta, learning_rate=rate) for name, beta in plan.gem]  # type: ignore[arg-type]
    dft = best(Trial(method="dft", teacher="k2", alpha=alpha, learning_rate=rate) for alpha in plan.alphas)
    dft = best([dft, *(replace(dft, teacher=teacher) for teacher in plan.teachers if teacher != "base")])
    dft = best([dft, at_best_rate(dft)])
    finalists = {"ce": ce, "rival": best(rivals), "dft": dft}
    if "base" in plan.teachers:
        finalists["dft_of_base"] = replace(dft, teacher="base")
    return finalists


def difference(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First minus second, nats per label, of trials paired by seed: its mean, and 95% of what resampling gives it."""
    names = sorted(first[0]["documents"])
    labels = np.array([first[0]["documents"][name][1] for name in names], dtype=np.float64)
    gaps = np.array(
        [
            [one["documents"][name][0] - other["documents"][name][0] for name in names]
            for one, other in zip(first, second, strict=True)
        ]
    )
    generator = np.random.default_rng(0)
    documents = generator.integers(len(names), size=(_RESAMPLES, len(names)))
    seeds = generator.integers(len(gaps), size=(_RESAMPLES, len(gaps)))
    per_seed = gaps[:, documents].sum(2) / labels[documents].sum(1)
    drawn = np.take_along_axis(per_seed.T, seeds, 1).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(gaps.sum(1).mean() / labels.sum()), "ci95": [float(low), float(high)]}


def compared(group: TrialGroup, plan: Plan) -> dict[str, Any]:
    """One text and student: what was tuned, the finalists on all seeds, and their differences from cross-entropy."""
    finalists = tuned(group, plan)
    results = {
        name: [group.result(replace(trial, seed=seed)) for seed in range(plan.seeds)]
        for name, trial in finalists.items()
    }
    base = group.result(Trial(method="base"))
    rows = [_row("base", [base] * plan.seeds, results["ce"])]
    rows += [_row(finalists[name].label, found, results["ce"]) for name, found in results.items()]
    _say_rows(group, rows)
    return {
        "course": group.text.name,
        "student": group.student,
        "train_tokens": group.text.num_train_tokens,
        "finalists": {name: asdict(trial) for name, trial in finalists.items()},
        "rows": dict(zip(["base", *results], rows, strict=True)),
        "tuning": _tuning(group, plan),
    }


def _tuning(group: TrialGroup, plan: Plan) -> list[dict[str, Any]]:
    """All trials of the first seed, the best first."""
    found = group.records.of(group.digest, seed=0)
    return sorted(
        ({"label": one["label"], "dev_nll": min(one["dev_nll"]), "nll": one["nll"]} for one in found),
        key=lambda row: row["dev_nll"],
    )


def _row(label: str, found: Sequence[Mapping[str, Any]], ce: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in found[0]["samples"] if not name.startswith("human_")]
    return {
        "label": label,
        "nll": statistics.mean(one["nll"] for one in found),
        "ece": statistics.mean(one["ece"] for one in found),
        "minus_ce": difference(found, ce),
        "samples": {name: statistics.mean(one["samples"][name] for one in found) for name in names},
        "human": {name: found[0]["samples"].get(f"human_{name}") for name in names},
    }


def _say_rows(group: TrialGroup, rows: Sequence[Mapping[str, Any]]) -> None:
    say(f"{group.text.name}, student: {group.student}")
    say_table(
        ("", "NLL", "over CE", "95%", "ECE"),
        [
            (
                row["label"],
                f"{row['nll']:.4f}",
                f"{row['minus_ce']['mean']:+.4f}",
                "{:+.4f} to {:+.4f}".format(*row["minus_ce"]["ci95"]),
                f"{row['ece']:.4f}",
            )
            for row in rows
        ],
    )


def measure(options: Options) -> Result:
    plan = _QUICK if options.quick else _FULL
    check_other_losses()
    records = Records(None if options.quick else _RECORDS)
    texts = [open_scored_text(name, plan.size, plan.teachers, options.cache) for name in plan.courses]
    groups = [
        TrialGroup(
            text=text,
            student=student,
            epochs=plan.size.epochs,
            cache=options.cache,
            records=records,
            say=say,
            sample_tokens=16 if options.quick else 64,
        )
        for student in plan.students
        for text in texts
    ]
    tables = _in_processes(groups, plan)
    return Result(figures=_figures(tables), details={"plan": asdict(plan), "tables": tables})


def _in_processes(groups: Sequence[TrialGroup], plan: Plan) -> list[dict[str, Any]]:
    """`compared` of each group, as many at a time as there are cores: one thread a group wastes the least of them."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(groups), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(compared, groups, [plan] * len(groups)))


def _figures(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over texts and students, and those of each."""

    def of(rows: Mapping[str, Any]) -> dict[str, Any]:
        nlls = {f"{name}_nll": round(rows[name]["nll"], 4) for name in ("base", "ce", "rival", "dft")}
        gap = rows["dft"]["minus_ce"]
        return {
            **nlls,
            "dft_minus_ce": round(gap["mean"], 4),
            "dft_minus_ce_ci95": [round(end, 4) for end in gap["ci95"]],
        }

    each = {f"{table['course']}_{table['student']}": of(table["rows"]) for table in tables}
    names = [name for name in next(iter(each.values())) if name != "dft_minus_ce_ci95"]
    means: dict[str, Any] = {
        name: round(statistics.mean(figures[name] for figures in each.values()), 4) for name in names
    }
    # The tables share no document, so their errors are independent.
    halves = [[abs(end - one["dft_minus_ce"]) for end in one["dft_minus_ce_ci95"]] for one in each.values()]
    spread = [sum(half[side] ** 2 for half in halves) ** 0.5 / len(halves) for side in (0, 1)]
    means["dft_minus_ce_ci95"] = [
        round(means["dft_minus_ce"] - spread[0], 4),
        round(means["dft_minus_ce"] + spread[1], 4),
    ]
    return {**means, **{f"{name}_{key}": value for name, one in each.items() for key, value in one.items()}}
