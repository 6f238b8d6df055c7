"""One training of a student and its measurements, stored under a digest of everything that it depends on.

In: a text, a training method and a seed. Out: the loss on human tokens after each epoch, on the first half of the
hold-out; and for the best epoch, on the other half, that loss by document, the calibration error, and the metrics of
continuations of held-out beginnings beside the human ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.training.other_losses import EntropicMatching, LabelSmoothing
from benchmarks.training.texts import LORA, MODEL, ScoredText, smaller_student, wrap_tokenizer
from softshard.config import LoraSettings, OptimizerSettings
from softshard.data.dataset import SoftLabelDataset
from softshard.evaluate.comparison import human_metrics, model_metrics
from softshard.evaluate.samples import generate, human_continuations, make_prompts
from softshard.evaluate.scoring import HoldoutScores, score_holdout
from softshard.finetune.loop import Step, fine_tune
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.models import load_model, weights_digest
from softshard.records.digest import canonical_digest

__all__ = ["PRECISION", "Records", "Trained", "Trial", "TrialGroup"]

Method = Literal["base", "ce", "smoothing", "gem_linear", "gem_logsigmoid", "dft"]
Student = Literal["same", "smaller"]
_BATCH_TOKENS, _SHUFFLE, _BINS = 1024, 4096, 15
PRECISION = torch.bfloat16
"""Of the frozen weights and of all products, in training and in scoring; adapters and losses are float32. On a CPU with
products of this type a step takes .4 of the time that it takes in float32."""
_SAMPLES, _PROMPT_TOKENS = 12, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A way to train; `base` is not trained at all."""

    method: Method
    learning_rate: float = 0.0
    alpha: float = 1.0
    """Weight of the person's own token; of `dft` alone."""
    teacher: str = ""
    """Of `dft`: a target set of the text."""
    strength: float = 0.0
    """epsilon of `smoothing`, beta of GEM."""
    seed: int = 0
    """Of the adapter's first weights and of the order."""

    @property
    def label(self) -> str:
        """In a few words, without the seed."""
        rate = f"lr {self.learning_rate:g}"
        return {
            "base": "base",
            "ce": f"CE, {rate}",
            "smoothing": f"CE smoothed {self.strength:g}, {rate}",
            "gem_linear": f"GEM linear {self.strength:g}, {rate}",
            "gem_logsigmoid": f"GEM logsigmoid {self.strength:g}, {rate}",
            "dft": f"DFT {self.teacher}, alpha {self.alpha:g}, {rate}",
        }[self.method]

    @property
    def objective(self) -> Objective:
        if self.method == "smoothing":
            return LabelSmoothing(epsilon=self.strength)
        if self.method == "gem_linear":
            return EntropicMatching(beta=self.strength, h="linear")
        if self.method == "gem_logsigmoid":
            return EntropicMatching(beta=self.strength, h="logsigmoid")
        return CROSS_ENTROPY


class Records:
    """Finished trials, a line each, in a file that only grows; in memory alone where there is no file.

    Processes may share the file if no two of them have the same group: each knows what was there when it began.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else []
        self._done: dict[str, dict[str, Any]] = {(record := json.loads(line))["key"]: record for line in lines}

    def of(self, group: str, *, seed: int) -> list[dict[str, Any]]:
        """Those of a group's digest and a seed."""
        found = self._done.values()
        return [record for record in found if record["school"] == group and record["trial"]["seed"] == seed]

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a key, made now where there is none."""
        if key not in self._done:
            self._done[key] = {"key": key, **make()}
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self._done[key]) + "\n")
        return self._done[key]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A student, and how it came about."""

    model: Any
    """As it was after its best epoch, in evaluation mode."""
    dev_nll: tuple[float, ...]
    """On the first half of the hold-out after each epoch, nats per label."""
    loss: tuple[float, ...]
    """Of each step."""


@dataclass(frozen=True, kw_only=True)
class TrialGroup:
    """Trials of one text and one student."""

    text: ScoredText
    student: Student
    epochs: int
    cache: Path
    records: Records
    say: Callable[[str], None]
    sample_tokens: int = 64
    """Length of the continuations whose metrics are measured."""

    @cached_property
    def _folder(self) -> Path:
        return smaller_student(self.cache) if self.student == "smaller" else self.cache / MODEL

    @cached_property
    def _lora(self) -> LoraSettings:
        """The smaller student has to be adapted in all of its layers, since many of them are gone."""
        wanted = {**LORA, "rank": 16, "alpha": 32, "last_layers": None} if self.student == "smaller" else LORA
        return LoraSettings.model_validate(wanted)

    @cached_property
    def digest(self) -> str:
        """Of all that its trials have in common."""
        shared = [
            self.text.digest,
            weights_digest(self._folder),
            self._lora.model_dump(),
            self.epochs,
            str(PRECISION),
        ]
        return canonical_digest(shared)[:16]

    def result(self, trial: Trial) -> dict[str, Any]:
        """What is on record of a trial, or is now."""
        return self.keep(trial, lambda: self._run(trial))

    def keep(self, trial: Trial, make: Callable[[], dict[str, Any]], *way: str) -> dict[str, Any]:
        """What `make` gives for a trial, once; `way` tells apart what differs in more than the trial."""
        return self.records.get(canonical_digest([self.digest, asdict(trial), *way])[:32], make)

    def _run(self, trial: Trial) -> dict[str, Any]:
        started = time.monotonic()
        trained = self.train(trial)
        scores = self.score(trained.model, half=1)
        record = {
            "school": self.digest,
            "course": self.text.name,
            "student": self.student,
            "trial": asdict(trial),
            "label": trial.label,
            "dev_nll": list(trained.dev_nll),
            "nll": scores.human_nll_nats,
            "ece": scores.ece,
            "entropy": scores.mean_entropy_nats,
            "documents": {name: [one.nll_nats, one.num_labels] for name, one in scores.documents.items()},
            "samples": self._samples(trained.model, scores, seed=trial.seed),
            "loss": [round(loss, 4) for loss in trained.loss],
            "seconds": round(time.monotonic() - started),
        }
        self.say(
            f"{self.text.name}, {self.student}, seed {trial.seed}: {trial.label}:"
            f" {min(trained.dev_nll):.4f} to choose by, {record['nll']:.4f}, {record['seconds']} s"
        )
        return record

    def train(self, trial: Trial, objective: Objective | None = None) -> Trained:
        """A student after its best epoch. `objective` takes the place of the trial's own."""
        model = load_model(self._folder, dtype=PRECISION, device="cpu")
        if trial.method == "base":
            return Trained(model=model.eval(), dev_nll=(self.score(model.eval(), half=0).human_nll_nats,), loss=())
        data = SoftLabelDataset(
            self.text.targets(trial.teacher or "k2"),
            seed=trial.seed,
            batch_tokens=_BATCH_TOKENS,
            shuffle_buffer=_SHUFFLE,
            alpha=trial.alpha,
            rank=0,
            world_size=1,
        )
        steps_of_epoch = data.batches_per_epoch(0)
        dev: list[float] = []
        best: dict[str, Tensor] = {}

        def look(step: Step) -> None:
            if step.step % steps_of_epoch and step.step != step.total_steps:
                return
            dev.append(self.score(model, half=0).human_nll_nats)
            if dev[-1] == min(dev):
                best.update({name: item.detach().clone() for name, item in _trained(model).items()})

        tuned = fine_tune(
            model,
            data,
            lora=self._lora,
            optimizer=OptimizerSettings(
                learning_rate=trial.learning_rate, epochs=self.epochs, batch_tokens=_BATCH_TOKENS
            ),
            retention=None,
            seed=trial.seed,
            num_valid=data.metadata.vocab_size,
            chunk_positions=512,
            checkpoint=None,
            identity="",
            objective=objective or trial.objective,
            on_step=look,
        )
        with torch.no_grad():
            for name, item in _trained(model).items():
                item.copy_(best[name])
        return Trained(model=tuned.model, dev_nll=tuple(dev), loss=tuple(step.loss for step in tuned.log))

    def score(self, model: Any, *, half: int) -> HoldoutScores:
        """What a model in evaluation mode makes of one half of the hold-out."""
        rows = self.text.held_out(half)
        return score_holdout(
            model,
            rows,
            tokenizer=wrap_tokenizer(self.cache),
            num_valid=rows[0][1].vocab_size,
            batch_tokens=2048,
            num_bins=_BINS,
            on_progress=lambda done: None,
        )

    def _samples(self, model: Any, scores: HoldoutScores, *, seed: int) -> dict[str, float | None]:
        rows, tokenizer = self.text.held_out(1), wrap_tokenizer(self.cache)
        prompts = make_prompts(
            rows, num_samples=_SAMPLES, prompt_tokens=_PROMPT_TOKENS, sample_tokens=self.sample_tokens, seed=0
        )
        human = human_continuations(prompts, tokenizer=tokenizer)
        drawn = generate(
            model,
            prompts,
            tokenizer=tokenizer,
            sample_tokens=self.sample_tokens,
            temperature=1.0,
            seed=seed,
            device="cpu",
        )
        metrics = model_metrics(
            scores, drawn, human=human, vocab_size=rows[0][1].vocab_size, retention_nll_nats=None
        ).model_dump()
        names = ("mattr", "distinct_2", "sentence_length_w1", "token_l2", "mean_sentence_words", "mean_sample_tokens")
        own = human_metrics(human).model_dump()
        return {**{name: metrics[name] for name in names}, **{f"human_{k}": v for k, v in own.items() if k in names}}


def _trained(model: Any) -> dict[str, Tensor]:
    """Weights of the adapter, which lies in the model itself."""
    return {name: item for name, item in model.named_parameters() if item.requires_grad}
