"""Receipts, and the manifest of a whole run.

A receipt records that a part is committed. The manifest lists all receipts of a run, and readers take the list of parts
from it. Neither contains a time or a worker's name, so the same run gives the same bytes. `manifest.json` points at the
newest `manifests/<digest>.json` and is replaced last.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from softshard.config import SketchSettings, parse_sketch
from softshard.errors import ManifestMissing, PartCorrupt
from softshard.records.canonical import write_canonical_json
from softshard.records.json_stream import read_json_items
from softshard.records.record import Record, SpooledRecord
from softshard.records.spool import Spool, temporary_disk
from softshard.shard.schema import PART_SCHEMAS, Fidelity, check_version
from softshard.storage import Store, open_store

__all__ = [
    "Manifest",
    "Receipt",
    "SourceRights",
    "Totals",
    "bytes_per_position",
    "make_pointer",
    "manifest_path",
    "mean_fidelity",
    "read_manifest",
    "read_receipt",
    "sum_receipts",
    "write_manifest",
]


_MEANS = ("mean_squared_error", "gradient_angle_degrees", "mean_kl_nats", "mean_entries")


class Receipt(Record):
    """The record that a part is committed."""

    part_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Digest of everything that can change the part's bytes."""
    path: str = Field(pattern=r"^data/(train|test)/[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Path of the part below `targets/`, and nowhere else."""
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


class Totals(NamedTuple):
    """Sums over the parts of a run."""

    num_parts: int
    num_sequences: int
    num_labels: int
    num_bytes: int


class SourceRights(Record):
    """Where text came from and by what right it is used."""

    name: str
    style: str
    license: str
    rights_basis: str


class Manifest(SpooledRecord):
    """The record of a whole run of the targets stage."""

    schema_version: int
    """Of all parts."""
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
    parts: Spool[Receipt]
    """Receipts, in the order of the corpus."""

    @cached_property
    def totals(self) -> Totals:
        """Sums over all parts, computed once."""
        return sum_receipts(self.parts)

    @property
    def sketch(self) -> SketchSettings:
        """`target` as settings, which state what its kind stores and what it leaves out."""
        return parse_sketch(self.target)

    def of_split(self, split: str) -> tuple[Receipt, ...]:
        """Receipts of one split, in a pass over all parts."""
        return tuple(part for part in self.parts if part.split == split)


def sum_receipts(receipts: Iterable[Receipt]) -> Totals:
    """Sums over receipts, in one pass."""
    sums = dict.fromkeys(Totals._fields, 0)
    for receipt in receipts:
        sums["num_parts"] += 1
        for name in Totals._fields[1:]:
            sums[name] += getattr(receipt, name)
    return Totals(**sums)


def mean_fidelity(receipts: Collection[Receipt]) -> Fidelity | None:
    """Fidelity of many parts: means weighted by their labels; None without a label."""
    labels = num_ranked = 0
    has_kl = True
    for receipt in receipts:
        labels += receipt.num_labels
        num_ranked += 0 if receipt.fidelity.mass_by_rank is None else receipt.fidelity.num_ranked
        has_kl &= receipt.fidelity.mean_kl_nats is not None
    if not labels:
        return None
    sums = dict.fromkeys(_MEANS, 0.0)
    masses: dict[str, float] = {}
    for receipt in receipts:
        fidelity = receipt.fidelity
        for name in _MEANS:
            sums[name] += (getattr(fidelity, name) or 0.0) * receipt.num_labels
        for rank, mass in (fidelity.mass_by_rank or {}).items():
            masses[rank] = masses.get(rank, 0.0) + mass * fidelity.num_ranked / num_ranked
    return Fidelity(
        mean_squared_error=sums["mean_squared_error"] / labels,
        gradient_angle_degrees=sums["gradient_angle_degrees"] / labels,
        mean_kl_nats=sums["mean_kl_nats"] / labels if has_kl else None,
        mean_entries=sums["mean_entries"] / labels,
        mass_by_rank=masses or None,
        num_ranked=num_ranked,
    )


def bytes_per_position(receipts: Collection[Receipt]) -> float | None:
    """Bytes of all parts per label; None without a label."""
    totals = sum_receipts(receipts)
    return totals.num_bytes / totals.num_labels if totals.num_labels else None


def read_receipt(store: Store, path: str) -> Receipt:
    """Read a receipt.

    Raises:
        FileNotFoundError: it does not exist.
        PartCorrupt: it cannot be read.
    """
    try:
        return Receipt.model_validate_json(store.read(path))
    except ValidationError as error:
        raise PartCorrupt(uri=f"{store.uri}/{path}", problem=f"is not a receipt: {error.errors()[0]['msg']}") from error


def manifest_path(digest: str) -> str:
    """Path of a manifest below `targets/`."""
    return f"manifests/{digest}.json"


def make_pointer(digest: str) -> bytes:
    """Content of the `manifest.json` that points at a manifest."""
    return (json.dumps({"manifest": manifest_path(digest), "digest": digest}) + "\n").encode()


def write_manifest(store: Store, manifest: Manifest) -> bool:
    """Write `manifests/<digest>.json`, then point `manifest.json` at it; False if it already did."""
    digest = manifest.digest
    pointer = make_pointer(digest)
    with tempfile.NamedTemporaryFile() as file:
        with temporary_disk():
            write_canonical_json(file, manifest.members())
            file.flush()
        store.put_file_once(manifest_path(digest), Path(file.name))
    if store.exists("manifest.json") and store.read("manifest.json") == pointer:
        return False
    store.replace("manifest.json", pointer)
    return True


def read_manifest(targets: Store | str | Path, *, digest: str | None = None) -> Manifest:
    """Read the newest manifest of a `targets/` folder, or the one with a digest.

    Raises:
        ManifestMissing: the targets are not complete, or have no manifest with that digest.
        PartCorrupt: the pointer or the manifest cannot be read, or the manifest has another digest than its name.
    """
    store = targets if not isinstance(targets, str | Path) else open_store(targets)
    uri = f"{store.uri}/manifest.json"
    if digest is not None:
        if not store.exists(manifest_path(digest)):
            raise ManifestMissing(uri=f"{store.uri}/{manifest_path(digest)}", stage="targets")
        return _read_verified(store, digest)
    try:
        digest = _parse_pointer(json.loads(store.read("manifest.json")))
    except FileNotFoundError as error:
        raise ManifestMissing(uri=uri, stage="targets") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartCorrupt(uri=uri, problem=f"does not point at a manifest: {error}") from error
    return _read_verified(store, digest)


def _read_verified(store: Store, digest: str) -> Manifest:
    uri = f"{store.uri}/{manifest_path(digest)}"
    try:
        manifest = _parse_manifest(store, manifest_path(digest))
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="is missing, and manifest.json points at it") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartCorrupt(uri=uri, problem=f"is not a manifest: {error}") from error
    check_version(manifest.schema_version, known=PART_SCHEMAS, uri=uri)
    if (actual := manifest.digest) != digest:
        raise PartCorrupt(uri=uri, problem=f"has the digest {actual[:16]}, and not that of its name")
    try:
        parse_sketch(manifest.target)
    except ValueError as error:
        raise PartCorrupt(uri=uri, problem=f"has a `target` that is not the settings of a sketch: {error}") from error
    return manifest


def _parse_pointer(pointer: Any) -> str:
    """Digest in a pointer. Raises ValueError for a pointer that names another file than that digest's manifest."""
    digest = str(pointer["digest"])
    if not re.fullmatch("[0-9a-f]{64}", digest) or pointer["manifest"] != manifest_path(digest):
        raise ValueError(f"it names {pointer['manifest']!r}")
    return digest


def _parse_manifest(store: Store, path: str) -> Manifest:
    parts = Spool(Receipt)
    with store.open(path) as file:
        values = read_json_items(file, name="parts", on_item=lambda item: parts.append(Receipt.model_validate(item)))
    return Manifest.model_validate({**values, "parts": parts})
