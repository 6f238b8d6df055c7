"""Finds the files of a `targets/` folder that its manifest does not name, and says what each of them is.

No reader of the newest manifest opens them: they come from earlier settings or from a run that was stopped, or were
moved aside. Parts of an older manifest have a kind of their own, because a reader of that manifest may still open them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from softshard.errors import PartCorrupt
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import Manifest, manifest_path, read_receipt
from softshard.storage import Store

__all__ = ["Orphan", "OrphanKind", "find_orphans"]

OrphanKind = Literal[
    "part without a receipt",
    "receipt without its part",
    "damaged receipt",
    "damaged manifest",
    "committed, but in no manifest",
    "of an older manifest",
    "slice of no corpus",
    "temporary",
    "set aside",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A file that the manifest does not name."""

    path: str
    num_bytes: int
    kind: OrphanKind


def find_orphans(store: Store, named: Collection[str]) -> tuple[Orphan, ...]:
    """Files of a `targets/` folder that are not named, sorted by kind and path.

    Args:
        store: the folder.
        named: paths of the newest manifest, of its parts and of their receipts; without a manifest, of all committed
            parts and their receipts.
    """
    manifests = [path for path in store.list("manifests") if path not in named]
    kinds: dict[str, OrphanKind] = {}
    for path in manifests:
        older = _read_older(store, path)
        kinds[path] = "damaged manifest" if older is None else "of an older manifest"
        if older is not None:
            for receipt in older.parts:
                kinds[receipt.path] = kinds[receipt_path(receipt.part_id)] = "of an older manifest"
    parts, rest = store.list("data"), store.list("receipts")
    for path in rest:
        if path not in named and path not in kinds:
            for file, kind in _classify_receipt(store, path, set(parts)).items():
                kinds.setdefault(file, kind)
    found = [path for path in (*parts, *rest, *manifests) if path not in named]
    orphans = [
        Orphan(path=path, num_bytes=store.size(path), kind=kinds.get(path, "part without a receipt")) for path in found
    ]
    return tuple(sorted(orphans, key=lambda orphan: (orphan.kind, orphan.path)))


def _classify_receipt(store: Store, path: str, parts: set[str]) -> dict[str, OrphanKind]:
    try:
        receipt = read_receipt(store, path)
    except PartCorrupt:
        return {path: "damaged receipt"}
    if receipt.path not in parts:
        return {path: "receipt without its part"}
    return {path: "committed, but in no manifest", receipt.path: "committed, but in no manifest"}


def _read_older(store: Store, path: str) -> Manifest | None:
    try:
        manifest = Manifest.model_validate_json(store.read(path))
    except ValidationError:
        return None
    return manifest if path == manifest_path(manifest.digest) else None
