"""Finding, and on request removing, the files of an output that no manifest names.

Targets and corpora are searched; adapters and reports never. While the targets have no manifest, everything committed
belongs to an unfinished run and is kept, as are the files of an unfinished corpus. Files that an older manifest names
are kept too, unless requested, because a reader of that manifest may still need them. Nothing is removed while another
run holds the lease.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

from softshard.corpus.manifest import read_corpus_manifest
from softshard.corpus.verify import find_corpus_orphans
from softshard.errors import ManifestMissing
from softshard.maintenance.verify import CORPORA
from softshard.output.lease import hold_lease
from softshard.output.status import job_values
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import manifest_path, read_manifest
from softshard.shard.orphans import Orphan, find_orphans
from softshard.shard.quarantine import QUARANTINE
from softshard.storage import Store, open_store

__all__ = ["Garbage", "collect_garbage"]

_TEMPORARY = tuple(
    f"{folder}.tmp"
    for folder in ("", *(f"{stage}/" for stage in (*CORPORA, "teacher", "targets", "adapter", "report")))
)
_OLDER = "of an older manifest"
_UNFINISHED = "committed, but in no manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Files that no manifest in use names, below the output folder."""

    removed: bool
    """Whether `files` have been removed, and not only found."""
    num_bytes: int
    """Of `files`."""
    files: tuple[Orphan, ...]
    older: tuple[Orphan, ...]
    """Older manifests and the files that they name; kept."""
    older_bytes: int


def collect_garbage(out: str, *, remove: bool, older: bool) -> Garbage:
    """Find, and with `remove` delete, the files that no manifest names.

    Args:
        out: the output folder.
        remove: delete the files.
        older: include older manifests and the files that they name.

    Raises:
        JobInvalid: there is no job in the folder.
        PartCorrupt: a manifest in use cannot be read, so the files that it names are unknown.
        OutputBusy: with `remove`, while a run works on the output.
    """
    store = open_store(out)
    job = job_values(store)["name"]
    if not remove:
        return _collect(store, older=older, removed=False)
    with hold_lease(store, job=job, run=f"gc-{uuid.uuid4().hex[:8]}") as lease:
        garbage = _collect(store, older=older, removed=True)
        for orphan in sorted(garbage.files, key=_order_of_removal):
            lease.check()
            store.remove(orphan.path)
    return garbage


def _order_of_removal(orphan: Orphan) -> tuple[bool, bool, str]:
    """Manifests, then receipts, then parts: if the removal is interrupted, no file names one that is gone."""
    return "/manifests/" not in orphan.path, "/receipts/" not in orphan.path, orphan.path


def _collect(store: Store, *, older: bool, removed: bool) -> Garbage:
    found = list(_find_all(store))
    kept = tuple(orphan for orphan in found if orphan.kind == _OLDER and not older)
    files = tuple(orphan for orphan in found if orphan.kind != _OLDER or older)
    return Garbage(
        removed=removed,
        num_bytes=sum(orphan.num_bytes for orphan in files),
        files=files,
        older=kept,
        older_bytes=sum(orphan.num_bytes for orphan in kept),
    )


def _find_all(store: Store) -> Iterator[Orphan]:
    yield from _find_in_targets(store.below("targets"))
    for name in CORPORA:
        manifest = read_corpus_manifest(store.below(name))
        if manifest is not None:
            for orphan in find_corpus_orphans(store.below(name), manifest):
                yield replace(orphan, path=f"{name}/{orphan.path}")
    for folder in _TEMPORARY:
        temporary = store.below(folder)
        for path in temporary.list(""):
            yield Orphan(path=f"{folder}/{path}", num_bytes=temporary.size(path), kind="temporary")
    for path in store.list(QUARANTINE):
        yield Orphan(path=path, num_bytes=store.size(path), kind="set aside")


def _find_in_targets(store: Store) -> Iterator[Orphan]:
    try:
        manifest = read_manifest(store)
    except ManifestMissing:
        manifest = None
    named = {manifest_path(manifest.digest)} if manifest else set()
    for receipt in manifest.parts if manifest else ():
        named |= {receipt.path, receipt_path(receipt.part_id)}
    for orphan in find_orphans(store, named):
        if manifest is not None or orphan.kind != _UNFINISHED:
            yield replace(orphan, path=f"targets/{orphan.path}")
