"""The records of a finished training beside its adapter: a receipt, a log, and the pointer to the newest ones.

A training is complete once its `receipt.json` exists. `adapter.json` names the adapter and the baseline of the job's
current settings, and is replaced last.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softshard.errors import PartCorrupt
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.manifest import SourceRights
from softshard.storage import Store

__all__ = [
    "FileName",
    "SweptTraining",
    "Trained",
    "TrainingReceipt",
    "check_files",
    "find_training",
    "read_log",
    "read_trained",
    "write_trained",
]


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name within one folder, which a path from elsewhere could leave."""


class TrainingReceipt(BaseModel):
    """The record that a training is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training_id: str
    folder: FileName
    """Folder of the adapter below `adapter/`."""
    files: dict[FileName, str]
    """SHA-256 of each file of the adapter. Its card is not among them: it describes more than the training, and may be
    rewritten."""
    manifests: tuple[str, ...]
    """Digests of the manifests of its targets; the job's own comes first, if it is used."""
    sources: tuple[SourceRights, ...]
    """Origin and rights of the text, including retention text."""
    settings: dict[str, Any]
    """The job's train section, including defaults."""
    objective: str
    alpha: float
    learning_rate: float
    retention_weight: float
    num_steps: int
    num_tokens: int
    holdout_nll_nats: float | None
    """Mean NLL of the hold-out's own tokens; null without a hold-out."""


class SweptTraining(BaseModel):
    """One training of a sweep, and its loss on the retention text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingReceipt
    retention_nll_nats: float | None
    """Mean NLL on the held-out retention text; null without one."""


class Trained(BaseModel):
    """`adapter.json`: the result of the job's current settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: TrainingReceipt
    baseline: TrainingReceipt | None
    candidates: tuple[TrainingReceipt, ...]
    """Trainings of the baseline, one per learning rate."""
    sweep: tuple[SweptTraining, ...] = ()
    """Trainings among which the adapter was chosen, in the order of the grid; empty without a sweep."""


def read_trained(store: Store) -> Trained | None:
    """`adapter.json`; None if nothing has been trained. Raises PartCorrupt."""
    try:
        return Trained.model_validate_json(store.read("adapter.json"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        uri = f"{store.uri}/adapter.json"
        raise PartCorrupt(uri=uri, problem=f"cannot be read: {error.errors()[0]['msg']}") from error


def read_log(store: Store, receipt: TrainingReceipt) -> list[dict[str, Any]]:
    """Steps of a training, in order."""
    return [json.loads(line) for line in store.read(f"{receipt.folder}/log.jsonl").splitlines()]


def write_trained(store: Store, trained: Trained) -> None:
    """Replace `adapter.json` if its content changes."""
    content = canonical_json(trained)
    if not store.exists("adapter.json") or store.read("adapter.json") != content:
        store.replace("adapter.json", content)


def find_training(store: Store, folder: str) -> TrainingReceipt | None:
    """Receipt of a complete training; None if the training has to be run.

    Raises:
        PartCorrupt: a file of the adapter differs from its SHA-256 in the receipt.
    """
    try:
        receipt = TrainingReceipt.model_validate_json(store.read(f"{folder}/receipt.json"))
        check_files(store, folder, receipt.files)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        uri = f"{store.uri}/{folder}/receipt.json"
        raise PartCorrupt(uri=uri, problem=f"cannot be read: {error.errors()[0]['msg']}") from error
    return receipt


def check_files(store: Store, folder: str, files: dict[str, str]) -> None:
    """Compare an adapter's files with the SHA-256 in its receipt.

    Raises:
        FileNotFoundError: a file is missing.
        PartCorrupt: a file differs from its SHA-256.
    """
    for name, expected in files.items():
        if sha256_hex(store.read(f"{folder}/{name}")) != expected:
            uri = f"{store.uri}/{folder}/{name}"
            raise PartCorrupt(uri=uri, problem="is not the file that the adapter's receipt names")
