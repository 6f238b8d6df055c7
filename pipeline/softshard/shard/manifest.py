"""Receipts, and the manifest of a whole run.

A receipt says that a part is committed; the manifest lists all receipts of a run and is what readers go by. Neither
carries a time or a worker's name: the same run gives the same bytes. `manifest.json` points at the newest of
`manifests/<digest>.json` and is replaced last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from softshard.config import digest_of
from softshard.errors import ManifestMissing, PartCorrupt
from softshard.shard.schema import Fidelity
from softshard.storage import LocalStore, Store

__all__ = [
    "Manifest",
    "Receipt",
    "SourceRights",
    "bytes_per_position",
    "canonical_json",
    "mean_fidelity",
    "read_manifest",
    "read_receipt",
    "write_manifest",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Receipt(_Record):
    """The record that a part is committed."""

    part_id: str
    """Digest of everything that can change the part's bytes."""
    path: str
    """Path of the part below `targets/`."""
    split: Literal["train", "test"]
    fold: int
    """Style teacher that scored it; -1: all, averaged."""
    slice: str
    """SHA-256 of the slice of the corpus that was scored."""
    sha256: str
    """SHA-256 of the part's bytes."""
    num_bytes: int
    num_sequences: int
    num_labels: int
    num_head_entries: int
    num_tail_entries: int
    label_logprob_sum: float
    """Sum of the labels' log-probabilities under the teacher, in nats, before they were put on a grid."""
    fidelity: Fidelity


class SourceRights(_Record):
    """Where text came from and by what right it is used."""

    name: str
    style: str
    license: str
    rights_basis: str


class Manifest(_Record):
    """The record of a whole run of the targets stage."""

    schema_version: int
    job: str
    """Name of the job."""
    corpus: str
    """Digest of the corpus manifest."""
    sources: tuple[SourceRights, ...]
    tokenizer_fingerprint: str
    vocab_size: int
    context_tokens: int
    overlap_tokens: int
    target: dict[str, Any]
    """Sketch settings."""
    seed: int
    teacher: dict[str, Any]
    """Identity of the teacher: engine, versions, dtype, threads, digests of weights and of each fold's adapter."""
    fidelity: Fidelity | None
    """Of all parts together, weighted by labels; null where there is no label."""
    bytes_per_position: float | None
    """Bytes of all parts, everything in them counted, over their labels."""
    parts: tuple[Receipt, ...]
    """Receipts, in the order of the corpus."""

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical JSON."""
        return digest_of(self)

    def of_split(self, split: str) -> tuple[Receipt, ...]:
        """Receipts of one split."""
        return tuple(part for part in self.parts if part.split == split)


def mean_fidelity(receipts: Sequence[Receipt]) -> Fidelity | None:
    """Fidelity of many parts: means weighted by labels. None where there is no label."""
    labels = sum(receipt.num_labels for receipt in receipts)
    if not labels:
        return None

    def mean(name: str) -> float:
        return float(sum(getattr(receipt.fidelity, name) * receipt.num_labels for receipt in receipts) / labels)

    ranked = [receipt.fidelity for receipt in receipts if receipt.fidelity.mass_by_rank is not None]
    num_ranked = sum(fidelity.num_ranked for fidelity in ranked)
    masses: dict[str, float] = {}
    for fidelity in ranked:
        for rank, mass in (fidelity.mass_by_rank or {}).items():
            masses[rank] = masses.get(rank, 0.0) + mass * fidelity.num_ranked / num_ranked
    has_kl = all(receipt.fidelity.mean_kl_nats is not None for receipt in receipts)
    return Fidelity(
        mean_squared_error=mean("mean_squared_error"),
        gradient_angle_degrees=mean("gradient_angle_degrees"),
        mean_kl_nats=mean("mean_kl_nats") if has_kl else None,
        mean_entries=mean("mean_entries"),
        mass_by_rank=masses or None,
        num_ranked=num_ranked,
    )


def bytes_per_position(receipts: Sequence[Receipt]) -> float | None:
    """Bytes of all parts over their labels. None where there is no label."""
    labels = sum(receipt.num_labels for receipt in receipts)
    return sum(receipt.num_bytes for receipt in receipts) / labels if labels else None


def canonical_json(record: BaseModel) -> bytes:
    """The record as indented JSON with sorted keys, ending in a newline."""
    return (json.dumps(record.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def read_receipt(store: Store, path: str) -> Receipt:
    """A receipt.

    Raises:
        FileNotFoundError: there is none.
        PartCorrupt: it cannot be read.
    """
    try:
        return Receipt.model_validate_json(store.read(path))
    except ValidationError as error:
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=f"is not a receipt: {error.errors()[0]['msg']}") from error


def write_manifest(store: Store, manifest: Manifest) -> bool:
    """Write `manifests/<digest>.json`, then point `manifest.json` at it; False if it pointed there already."""
    digest = manifest.digest
    path = f"manifests/{digest}.json"
    store.put_once(path, canonical_json(manifest))
    pointer = (json.dumps({"manifest": path, "digest": digest}) + "\n").encode()
    if store.exists("manifest.json") and store.read("manifest.json") == pointer:
        return False
    store.replace("manifest.json", pointer)
    return True


def read_manifest(targets: Store | str | Path) -> Manifest:
    """The newest manifest of a `targets/` folder.

    Raises:
        ManifestMissing: the targets are not complete.
        PartCorrupt: the manifest is not what the pointer names.
    """
    store = targets if not isinstance(targets, str | Path) else LocalStore(targets)
    uri = f"{store.uri}/manifest.json"
    try:
        pointer = json.loads(store.read("manifest.json"))
        manifest = Manifest.model_validate_json(store.read(pointer["manifest"]))
    except FileNotFoundError as error:
        raise ManifestMissing(uri=uri, stage="targets") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise PartCorrupt(uri=uri, problem=f"is not a manifest: {error}") from error
    if manifest.digest != pointer["digest"]:
        raise PartCorrupt(
            uri=uri,
            problem=f"names {pointer['digest'][:16]}, but the manifest's digest is {manifest.digest[:16]}",
        )
    return manifest
