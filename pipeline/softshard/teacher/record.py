"""The stored form of a finished adapter of the style teacher: a folder whose receipt is written last."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from softshard.errors import PartCorrupt
from softshard.finetune.record import FileName, check_files
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.storage import Store
from softshard.teacher.documents import DOCUMENTS_FILE

__all__ = [
    "LOG_FILE",
    "AdapterReceipt",
    "adapter_folder",
    "adapters_of_fold",
    "find_adapter",
    "parse_fold",
    "read_adapter_digest",
]

LOG_FILE = "log.jsonl"

_FOLDER = re.compile(r"fold-([0-9]+)-[0-9a-f]{16}")


def adapter_folder(fold: int, adapter_id: str) -> str:
    """Name of an adapter's folder below `teacher/`."""
    return f"fold-{fold}-{adapter_id[:16]}"


def parse_fold(name: str) -> int | None:
    """Fold of an adapter's folder; None for a name of another kind."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found else None


class AdapterReceipt(BaseModel):
    """The record that the adapter of a fold is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter_id: str
    fold: int
    recipe: str
    """Digest of everything that its weights depend on except the documents."""
    files: dict[FileName, str]
    """SHA-256 of each file."""
    digest: str
    """SHA-256 over the weight files; the ids of the parts that it scores depend on it."""
    num_sequences: int
    num_labels: int = Field(gt=0)
    final_loss: float
    """Mean cross-entropy of the last tenth of the steps, in nats."""

    @field_validator("files")
    @classmethod
    def _with_documents(cls, files: dict[str, str]) -> dict[str, str]:
        if DOCUMENTS_FILE not in files:
            raise ValueError(f"names no {DOCUMENTS_FILE}")
        return files

    @property
    def folder(self) -> str:
        """Folder of the adapter below `teacher/`."""
        return adapter_folder(self.fold, self.adapter_id)

    @property
    def weight_files(self) -> dict[str, str]:
        """Files that an engine loads, with the SHA-256 of each."""
        return {name: sha256 for name, sha256 in self.files.items() if name != DOCUMENTS_FILE}


def find_adapter(store: Store, folder: str) -> AdapterReceipt | None:
    """Receipt of the complete adapter in a folder; None if the folder or a file is missing.

    Raises:
        PartCorrupt: a file of the adapter does not have the hash that the receipt gives.
    """
    try:
        receipt = _read_receipt(store, folder)
        check_files(store, folder, receipt.files)
    except FileNotFoundError:
        return None
    return receipt


def read_adapter_digest(store: Store, folder: str) -> str:
    """The `digest` that a receipt would have for the weight files that are in a folder."""
    names = set(store.names(folder)) - {DOCUMENTS_FILE, LOG_FILE, "receipt.json"}
    return canonical_digest({name: sha256_hex(store.read(f"{folder}/{name}")) for name in names})


def adapters_of_fold(store: Store, fold: int) -> list[AdapterReceipt]:
    """Receipts of all adapters of a fold, whatever documents they were trained on. Raises PartCorrupt."""
    folders = [name for name in store.names(".") if parse_fold(name) == fold]
    return [_read_receipt(store, name) for name in folders if store.exists(f"{name}/receipt.json")]


def _read_receipt(store: Store, folder: str) -> AdapterReceipt:
    uri = f"{store.uri}/{folder}"
    try:
        receipt = AdapterReceipt.model_validate_json(store.read(f"{folder}/receipt.json"))
    except ValidationError as error:
        raise PartCorrupt(uri=uri, problem=f"its receipt cannot be read: {error.errors()[0]['msg']}") from error
    if receipt.folder != folder:
        raise PartCorrupt(uri=uri, problem=f"its receipt is that of {receipt.folder}")
    return receipt
