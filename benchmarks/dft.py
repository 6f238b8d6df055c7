"""Does distribution fine-tuning bring a model nearer to people's writing than ordinary fine-tuning that is tuned?

A literary and a conversational text; a student as large as the teacher (the same 30 layers, a light adapter on the last
ten), and one of twelve of its layers. For each: the base; cross-entropy at its best learning rate; smoothed labels;
GEM; and distribution fine-tuning (DFT) over alpha, over two and four folds and the mean of both teachers, and with the
unadapted base as teacher. Every training has the same text and the same number of epochs, and is kept as it was after
the epoch that does best on one half of the hold-out; by that half the settings are chosen, on one seed. At most four
finalists are then trained on three seeds, and measured on the other half: the loss on people's own tokens, the
calibration error, and what continuations measure. Differences are paired by document; their intervals come from
resampling documents and seeds.

A full run can be stopped at any time and goes on where it was: finished trials are lines of `results/dft.trials.jsonl`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from courses import Size, open_course
from harness import Options, Result, run, say, say_table
from rivals import check_rivals
from trials import Records, School, Student, Trial

_RECORDS = Path(__file__).parent / "results" / "dft.trials.jsonl"
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
    size=Size(num_documents=12, document_characters=900, teacher_epochs=1, epochs=1),
    courses=("literary",),
    students=("same",),
    learning_rates={"same": (1e-3,)},
    smoothing=(0.1,),
    gem=(("gem_linear", 0.7),),
    alphas=(0.5,),
    teachers=(),
    seeds=1,
)


def tuned(school: School, plan: Plan) -> dict[str, Trial]:
    """Finalists by name, each the best of its kind on one seed, by the first half of the hold-out."""

    def best(trials: Iterable[Trial]) -> Trial:
        return min(trials, key=lambda trial: min(school.result(trial)["dev_nll"]))

    def at_best_rate(trial: Trial) -> Trial:
        """At the best of the plan's rates, and of its highest doubled as long as that does better; one rate is kept."""
        rates = list(plan.learning_rates[school.student])
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
    """First minus second, nats a label, of trials paired by seed: its mean, and 95% of what resampling gives it."""
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


def compared(school: School, plan: Plan) -> dict[str, Any]:
    """One course and student: what was tuned, the finalists on all seeds, and their differences from cross-entropy."""
    finalists = tuned(school, plan)
    results = {
        name: [school.result(replace(trial, seed=seed)) for seed in range(plan.seeds)]
        for name, trial in finalists.items()
    }
    base = school.result(Trial(method="base"))
    rows = [_row("base", [base] * plan.seeds, results["ce"])]
    rows += [_row(finalists[name].label, found, results["ce"]) for name, found in results.items()]
    _say_rows(school, rows)
    return {
        "course": school.course.name,
        "student": school.student,
        "train_tokens": school.course.num_train_tokens,
        "finalists": {name: asdict(trial) for name, trial in finalists.items()},
        "rows": dict(zip(["base", *results], rows, strict=True)),
        "tuning": _tuning(school, plan),
    }


def _tuning(school: School, plan: Plan) -> list[dict[str, Any]]:
    """All trials of the first seed, the best first."""
    found = school.records.of(school.digest, seed=0)
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


def _say_rows(school: School, rows: Sequence[Mapping[str, Any]]) -> None:
    say(f"{school.course.name}, student: {school.student}")
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
    check_rivals()
    records = Records(None if options.quick else _RECORDS)
    courses = [open_course(name, plan.size, plan.teachers, options.cache) for name in plan.courses]
    schools = [
        School(
            course=course,
            student=student,
            epochs=plan.size.epochs,
            cache=options.cache,
            records=records,
            say=say,
        )
        for student in plan.students
        for course in courses
    ]
    tables = _in_processes(schools, plan)
    return Result(figures=_figures(tables), details={"plan": asdict(plan), "tables": tables})


def _in_processes(schools: Sequence[School], plan: Plan) -> list[dict[str, Any]]:
    """`compared` of each school, as many at a time as there are cores: one thread a school wastes the least of them."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(schools), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(compared, schools, [plan] * len(schools)))


def _figures(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over courses and students, and those of each."""

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


if __name__ == "__main__":
    sys.exit(run("dft", measure, description="Distribution fine-tuning beside ordinary fine-tuning that is tuned."))
