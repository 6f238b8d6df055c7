"""A text by people, split, with the targets of several teachers: the data of a trial of `benchmarks.dft`.

In: a material of the cache. Out: target sets of its train split, made by jobs that run once and stay in the cache, and
the held-out sequences: settings are chosen on one half of the documents, results come from the other. Documents are cut
short, so that there are enough of them to resample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import say
from softshard.config import Job
from softshard.data.blend import Blend
from softshard.data.target_set import TargetSet
from softshard.errors import JobInvalid
from softshard.models import Tokenizer, load_model, load_tokenizer
from softshard.records.digest import canonical_digest
from softshard.shard.manifest import read_manifest
from softshard.shard.read import Row, read_rows
from softshard.shard.schema import PartMetadata
from softshard.stages.job import run_job
from softshard.storage import open_store
from softshard.telemetry import SilentReporter

__all__ = ["LORA", "ScoredText", "Size", "open_scored_text", "smaller_student"]

MODEL = "SmolLM2-135M-Instruct"
LORA = {"rank": 8, "alpha": 16, "last_layers": 10}
_MATERIALS = {"literary": "fiction", "conversational": "chitchat"}
_LICENSES = {"literary": "LicenseRef-Brown", "conversational": "MIT"}
_FOLDS: Mapping[str, int] = {"base": 0, "k2": 2, "k4": 4}
"""By the name of a teacher; `k2+k4` is the mean of two."""
_STUDENT_LAYERS = (0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29)
"""Untrained it has a loss of 9.0 nats on other text of the kind; evenly spaced layers have 13, the first nine and the
last three 11."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    num_documents: int
    document_characters: int
    """Documents end with the paragraph in which they pass this."""
    teacher_epochs: float
    epochs: int
    """Of a trial, at most; the one is kept after which the loss on the first half of the hold-out is least."""


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """One text under its teachers."""

    name: str
    outputs: Mapping[str, Path]
    """Output folders of the jobs, by teacher."""

    def targets(self, teacher: str) -> TargetSet | Blend:
        """Train split under a teacher, or under the mean of several, joined by `+`."""
        sets = tuple(self.targets_of(name) for name in teacher.split("+"))
        return sets[0] if len(sets) == 1 else Blend(sets=sets, weights=(1.0,) * len(sets))

    def targets_of(self, teacher: str) -> TargetSet:
        """Those of one."""
        store = open_store(str(self.outputs[teacher])).below("targets")
        return TargetSet(store=store, manifest=read_manifest(store))

    @cached_property
    def digest(self) -> str:
        """Of all targets."""
        return canonical_digest({name: self.targets_of(name).manifest.digest for name in self.outputs})

    @cached_property
    def _held_out(self) -> list[tuple[Row, PartMetadata]]:
        known = self.targets_of("k2")
        return [row for receipt in known.manifest.of_split("test") for row in read_rows(known.store, receipt)]

    def held_out(self, half: int) -> list[tuple[Row, PartMetadata]]:
        """Rows of the hold-out's documents with an even id (0), by which is chosen, or an odd one (1)."""
        return [(row, metadata) for row, metadata in self._held_out if int(row[0].document_id, 16) % 2 == half]

    @property
    def num_train_tokens(self) -> int:
        return sum(receipt.num_labels for receipt in self.targets_of("k2").manifest.of_split("train"))


def open_scored_text(name: str, size: Size, teachers: Sequence[str], cache: Path) -> ScoredText:
    """A text with the targets of some teachers, whose jobs are run unless they are done.

    Raises:
        JobInvalid: the cache lacks the text or the model.
    """
    text, model = cache / f"{_MATERIALS[name]}.jsonl", cache / MODEL
    for path in (text, model):
        if not path.exists():
            problem = f"is not there; make it with: python jobs/materials.py presets --cache {cache}"
            raise JobInvalid(file=str(path), place="", problem=problem)
    folder = cache / "dft" / f"{name}-{canonical_digest([size.num_documents, size.document_characters])[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    cut = folder / "text.jsonl"
    cut.write_text(_cut(text, size), encoding="utf-8")
    outputs = {}
    for teacher in sorted({"k2", *(name for names in teachers for name in names.split("+"))}):
        outputs[teacher] = folder / f"{teacher}-{size.teacher_epochs:g}"
        job = Job.model_validate(_job(outputs[teacher], cut, model, style=name, folds=_FOLDS[teacher], size=size))
        run_job(job, SilentReporter(), stages=("corpus", "teacher", "targets"))
    scored = ScoredText(name=name, outputs=outputs)
    say(f"{name}: {scored.num_train_tokens:,} train tokens; targets of {', '.join(outputs)} are there")
    return scored


def _cut(text: Path, size: Size) -> str:
    """The first documents, each cut after the paragraph in which it passes the length."""
    lines = text.read_text(encoding="utf-8").splitlines()[: size.num_documents]
    cut = []
    for line in lines:
        row = json.loads(line)
        end = row["text"].find("\n", size.document_characters)
        cut.append(json.dumps({**row, "text": row["text"][: end if end >= 0 else None]}))
    return "\n".join(cut) + "\n"


def _job(out: Path, text: Path, model: Path, *, style: str, folds: int, size: Size) -> dict[str, Any]:
    source = {"name": "text", "uri": str(text), "style": style, "license": _LICENSES[style], "rights_basis": "licensed"}
    return {
        "name": out.name,
        "out": str(out),
        "corpus": {
            "sources": [source],
            "holdout_fraction": 0.5,
            "context_tokens": 256,
            "overlap_tokens": 32,
            "sequences_per_part": 64,
        },
        "teacher": {
            "model": str(model),
            "folds": folds,
            "lora": LORA,
            "optimizer": {"learning_rate": 1e-3, "epochs": size.teacher_epochs, "batch_tokens": 1024},
            "dtype": "float32",
            "training_dtype": "bfloat16",
        },
        "target": {"kind": "threshold", "tau": 1 / 24},
        "cluster": {"workers": 2},
        "train": {"baseline": None},
    }


def smaller_student(cache: Path) -> Path:
    """Folder of a model of twelve of the thirty layers, the first six and the last six, with the same tokenizer."""
    import torch
    from torch import nn

    folder = cache / "dft" / f"{MODEL}-{len(_STUDENT_LAYERS)}-layers"
    if not (folder / "tokenizer.json").is_file():
        model = load_model(cache / MODEL, dtype=torch.float32, device="cpu")
        model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in _STUDENT_LAYERS])
        model.config.num_hidden_layers = len(_STUDENT_LAYERS)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
            if (cache / MODEL / name).is_file():
                (folder / name).write_bytes((cache / MODEL / name).read_bytes())
    return folder


def wrap_tokenizer(cache: Path) -> Tokenizer:
    """Of teacher and students."""
    return load_tokenizer(cache / MODEL)
