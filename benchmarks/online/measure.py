"""Does training from stored targets end where training with a live teacher ends?

A literary text and the style teachers of two folds, as in `benchmarks.dft`. Two trainings start from the same weights
and take the same batches in the same order. One reads the targets that a job stored (threshold sampling, tau = 1/24,
one draw, the same in every epoch). The other runs the teacher of each sequence's fold beside the student and uses its
whole distribution over the vocabulary, with the same weight of the human token. Before that, the live teachers'
log-probabilities of the human tokens are compared with the stored ones. Differences of the hold-out loss are paired by
seed.

A full run can be stopped at any time and resumes: finished trainings are lines of `results/online.trials.jsonl`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Options, Result, require, say, say_table
from benchmarks.training.other_losses import LogitsObjective
from benchmarks.training.texts import MODEL, ScoredText, Size, open_scored_text
from benchmarks.training.trials import PRECISION, Records, Trial, TrialGroup
from softshard.data.batch import Batch, collate
from softshard.data.mixing import Mixing
from softshard.finetune.adapters.lora import load_adapter
from softshard.finetune.hidden_states import hidden_states, mixed_precision
from softshard.finetune.objective import Objective
from softshard.models import load_model
from softshard.models.decoder import Decoder
from softshard.shard.read import read_rows
from softshard.stages.teacher.stage import named_teacher
from softshard.storage import open_store

_RECORDS = RESULTS / "online.trials.jsonl"
_TEACHER = "k2"
_MOST_OFF = 0.1
"""Nats, in the mean over labels: the grid of stored log-probabilities is 1/16, and stored ones are of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    size: Size
    alphas: tuple[float, ...]
    seeds: int
    learning_rate: float = 1e-3


_FULL = Plan(
    size=Size(num_documents=48, document_characters=2_400, teacher_epochs=2, epochs=2), alphas=(0.0, 0.5), seeds=1
)
_QUICK = Plan(size=Size(num_documents=8, document_characters=300, teacher_epochs=1, epochs=1), alphas=(0.5,), seeds=1)


class FoldTeachers:
    """The model that scored the targets of a text, with the adapters of all folds, in memory."""

    def __init__(self, text: ScoredText, model: Path) -> None:
        targets = text.targets_of(_TEACHER)
        manifest, out = targets.manifest, text.outputs[_TEACHER]
        adapters = named_teacher(open_store(str(out)).below("teacher"), manifest.teacher["adapters"]).adapters
        base: Any = load_model(model, dtype=PRECISION, device="cpu")
        for receipt in adapters:
            base = load_adapter(base, out / "teacher" / receipt.folder, adapter_name=str(receipt.fold), device="cpu")
        self._model = base.eval().requires_grad_(requires_grad=False)
        self._fold_of = {
            sequence.token_ids.tobytes(): receipt.fold
            for receipt in manifest.of_split("train")
            for (sequence, _), _ in read_rows(targets.store, receipt)
        }

    @torch.no_grad()
    def distributions(self, batch: Batch, num_valid: int) -> Tensor:
        """[N, V] float32 probabilities at the batch's positions, each of the teacher of its sequence's fold."""
        folds = torch.tensor([self._fold(row) for row in self._rows(batch)])
        of_label = folds[batch.positions // batch.input_ids.shape[1]]
        whole = torch.empty((len(batch.labels), num_valid))
        for fold in set(folds.tolist()):
            self._model.set_adapter(str(fold))
            decoder = Decoder.of(self._model)
            chosen = of_label == fold
            states = hidden_states(decoder, batch)[chosen]
            with mixed_precision(decoder):
                whole[chosen] = torch.softmax(decoder.logits(states)[:, :num_valid].float(), 1)
        return whole

    def _rows(self, batch: Batch) -> list[Tensor]:
        if batch.attention_mask is None:
            raise ValueError("the batch is packed")
        lengths = batch.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(batch.input_ids, lengths, strict=True)]

    def _fold(self, row: Tensor) -> int:
        return self._fold_of[row.numpy().astype(np.int32).tobytes()]


class LiveTeacher(LogitsObjective):
    """Cross-entropy to alpha on the label and the rest as the teachers have it now, whatever the batch has stored."""

    _teachers: FoldTeachers
    _alpha: float

    def __init__(self, teachers: FoldTeachers, *, alpha: float) -> None:
        super().__init__()
        # No fields of the frozen class: a training is named by those, and would copy the models.
        object.__setattr__(self, "_teachers", teachers)
        object.__setattr__(self, "_alpha", alpha)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        wanted = (1 - self._alpha) * self._teachers.distributions(batch, logits.shape[1])
        wanted[torch.arange(len(wanted)), batch.labels] += self._alpha
        return -(wanted * torch.log_softmax(logits, 1)).sum(1)


def _check(text: ScoredText, teachers: FoldTeachers) -> None:
    """The live teachers are those of the stored targets: a part of each fold has the same loss on its labels."""
    targets = text.targets_of(_TEACHER)
    firsts = {receipt.fold: receipt for receipt in reversed(targets.manifest.of_split("train"))}
    for fold, receipt in sorted(firsts.items()):
        rows = list(read_rows(targets.store, receipt))[:4]
        scored = torch.from_numpy(np.concatenate([stored.label_logprob for (_, stored), _ in rows])).double()
        metadata = rows[0][1]
        batch = collate([row for row, _ in rows], metadata=metadata, mixing=Mixing(alpha=0.0, truncated="ghost"))
        live = teachers.distributions(batch, metadata.vocab_size)
        logprobs = live[torch.arange(len(live)), batch.labels].double().log()
        off = float((logprobs - scored).abs().mean())
        require(
            off < _MOST_OFF, f"fold {fold}: live log-probabilities of labels are the stored ones, {off:.3f} nats off"
        )


def measure(options: Options) -> Result:
    plan = _QUICK if options.quick else _FULL
    torch.set_num_threads(1)
    text = open_scored_text("literary", plan.size, (_TEACHER,), options.cache)
    group = TrialGroup(
        text=text,
        student="same",
        epochs=plan.size.epochs,
        cache=options.cache,
        records=Records(None if options.quick else _RECORDS),
        say=say,
    )
    teachers = FoldTeachers(text, options.cache / MODEL)
    _check(text, teachers)
    rows = [
        _pair(
            group,
            teachers,
            Trial(method="dft", teacher=_TEACHER, alpha=alpha, learning_rate=plan.learning_rate, seed=seed),
        )
        for seed in range(plan.seeds)
        for alpha in plan.alphas
    ]
    base = group.score(group.train(Trial(method="base")).model, half=1).human_nll_nats
    say_table(
        ("alpha, seed", "stored", "online", "difference", "seconds, online/stored"),
        [
            (
                f"{row['alpha']:g}, {row['seed']}",
                f"{row['stored_nll']:.4f}",
                f"{row['online_nll']:.4f}",
                f"{row['stored_nll'] - row['online_nll']:+.4f}",
                f"{row['online_s'] / row['stored_s']:.2f}",
            )
            for row in rows
        ],
    )
    return Result(figures=_figures(rows, base, plan.alphas), details={"rows": rows})


def _pair(group: TrialGroup, teachers: FoldTeachers, trial: Trial) -> dict[str, float]:
    found: dict[str, float] = {"alpha": trial.alpha, "seed": trial.seed}
    for name, objective in (("stored", None), ("online", LiveTeacher(teachers, alpha=trial.alpha))):
        record = group.keep(trial, partial(_trained, group, trial, objective), name)
        say(f"alpha {trial.alpha:g}, seed {trial.seed}, {name}: {record['nll']:.4f}, {record['seconds']:.0f} s")
        found |= {f"{name}_s": record["seconds"], f"{name}_nll": record["nll"]}
    return found


def _trained(group: TrialGroup, trial: Trial, objective: Objective | None) -> dict[str, Any]:
    started = time.process_time()
    trained = group.train(trial, objective)
    seconds = time.process_time() - started
    return {"nll": group.score(trained.model, half=1).human_nll_nats, "seconds": seconds}


def _figures(rows: Sequence[Mapping[str, float]], base: float, alphas: Sequence[float]) -> dict[str, Any]:
    """`stored_minus_online` is the mean over seeds of the weight where it is largest in size."""

    def gap(alpha: float) -> float:
        return statistics.mean(row["stored_nll"] - row["online_nll"] for row in rows if row["alpha"] == alpha)

    gaps = {alpha: gap(alpha) for alpha in alphas}
    return {
        "base_nll": round(base, 4),
        "stored_nll": round(statistics.mean(row["stored_nll"] for row in rows), 4),
        "online_nll": round(statistics.mean(row["online_nll"] for row in rows), 4),
        "stored_minus_online": round(max(gaps.values(), key=abs), 4),
        **{f"stored_minus_online_alpha_{alpha:g}": round(value, 4) for alpha, value in gaps.items()},
        "largest_difference_of_a_seed": round(max(abs(row["stored_nll"] - row["online_nll"]) for row in rows), 4),
        "online_time_over_stored": round(sum(r["online_s"] for r in rows) / sum(r["stored_s"] for r in rows), 2),
    }
