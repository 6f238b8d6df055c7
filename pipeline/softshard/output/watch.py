"""Watching a run from outside: repeated looks at its output, on any store and from any machine, until it is complete.

The figures come from the corpus's manifest, the receipts and the lease alone; no cluster is contacted. Receipts never
change, so each is read once: a look lists names and reads the new ones.

A receipt does not say with which settings its part was made. So parts of an earlier run count until a new part of one
of their slices shows that the settings or the teacher have changed; from then on only new parts count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from softshard.corpus.manifest import CorpusManifest, CorpusSlice, read_corpus_manifest
from softshard.errors import ManifestMissing
from softshard.output.lease import LEASE_FOLDER, Holder, Pace
from softshard.output.status import job_values
from softshard.shard.manifest import Manifest, Receipt, read_manifest, read_receipt
from softshard.storage import Store

__all__ = ["LiveStatus", "RunSeen", "Watcher"]

_READERS = 16
_SECONDS_OF_RATE = 300.0
_NUM_LAST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeen:
    """The run that holds the lease."""

    run: str
    host: str
    pid: int
    silent_seconds: float
    """Time since the last renewal of the lease that this watch has seen."""

    @property
    def is_alive(self) -> bool:
        """Whether the lease was renewed, or first seen, within the expiry time."""
        return self.silent_seconds < Pace().expiry_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStatus:
    """The result of one look. Totals are None until the corpus is complete."""

    time: str
    """Time of the look, UTC."""
    out: str
    job: str
    complete: bool
    """Every part of the corpus is in the manifest, and no run is active."""
    targets_complete: bool
    parts: int
    parts_total: int | None
    positions: int
    positions_total: int | None
    bytes: int
    positions_per_second: float | None
    """Over the last five minutes of this watch; None on the first look."""
    eta_seconds: float | None
    run: RunSeen | None
    last_parts: tuple[str, ...]
    """The newest parts that were committed during this watch, the newest last."""


class Watcher:
    """Looks at an output repeatedly and remembers what it has read. `clock` is monotonic."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._targets = store, store.below("targets")
        self._clock = clock
        self._job = str(job_values(store)["name"])
        self._corpus: CorpusManifest | None = None
        self._corpus_size: int | None = None
        self._slices: dict[str, CorpusSlice] = {}
        self._manifest: Manifest | None = None
        self._named: dict[str, Receipt] = {}
        self._pointer: bytes | None = None
        self._receipts: dict[str, Receipt] = {}
        self._last: deque[str] = deque(maxlen=_NUM_LAST)
        self._new_ids: set[str] = set()
        self._history: deque[tuple[float, int]] = deque()
        self._committed = 0
        self._lease: tuple[bytes, float] | None = None

    def look(self) -> LiveStatus:
        """The present state.

        Raises:
            PartCorrupt: a receipt or a manifest cannot be read.
        """
        run = self._read_lease()
        new = self._read_receipts()
        self._read_corpus(new)
        self._read_manifest()
        done = self._done()
        positions = sum(receipt.num_labels for receipt in done)
        total = sum(part.num_labels for part in self._slices.values()) if self._corpus else None
        rate = self._rate(sum(receipt.num_labels for receipt in new))
        finished = self._manifest is not None and len(done) == len(self._slices) and self._is_of_corpus()
        return LiveStatus(
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            out=self._store.uri,
            job=self._job,
            complete=finished and not (run and run.is_alive),
            targets_complete=finished,
            parts=len(done),
            parts_total=len(self._slices) if self._corpus else None,
            positions=positions,
            positions_total=total,
            bytes=sum(receipt.num_bytes for receipt in done),
            positions_per_second=rate,
            eta_seconds=None if total is None or not rate else (total - positions) / rate,
            run=run,
            last_parts=tuple(self._last),
        )

    def _read_receipts(self) -> list[Receipt]:
        """Receipts that are new since the last look; none at the first look."""
        names = [name for name in self._targets.list("receipts") if name not in self._receipts]
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda name: read_receipt(self._targets, name), names))
        self._receipts.update(zip(names, found, strict=True))
        is_first_look = not self._history
        if is_first_look:
            return []
        self._last.extend(receipt.path for receipt in found)
        self._new_ids.update(receipt.part_id for receipt in found)
        return found

    def _read_corpus(self, new: Iterable[Receipt]) -> None:
        """Read the corpus's manifest, again when its size has changed or a new part is of an unknown slice."""
        store = self._store.below("corpus")
        if not store.exists("manifest.json"):
            self._corpus, self._slices = None, {}
            return
        size = store.size("manifest.json")
        if size != self._corpus_size or any(receipt.slice not in self._slices for receipt in new):
            self._corpus, self._corpus_size = read_corpus_manifest(store), size
            self._slices = {part.sha256: part for part in self._corpus.slices} if self._corpus else {}

    def _read_manifest(self) -> None:
        """Read the newest manifest of the targets, again when the pointer to it has changed."""
        pointer = self._targets.read("manifest.json") if self._targets.exists("manifest.json") else None
        if pointer != self._pointer:
            try:
                self._manifest = read_manifest(self._targets)
            except ManifestMissing:
                self._manifest = None
            self._named = {part.part_id: part for part in self._manifest.parts} if self._manifest else {}
            self._pointer = pointer
            self._new_ids.clear()

    def _is_of_corpus(self) -> bool:
        return {part.slice for part in self._named.values()} == set(self._slices)

    def _done(self) -> list[Receipt]:
        """One receipt for each slice of the corpus that has a part which counts."""
        named = self._named
        of_manifest = {part.slice: part for part in named.values() if part.slice in self._slices}
        others = {
            receipt.slice: receipt
            for receipt in self._receipts.values()
            if receipt.slice in self._slices and receipt.part_id not in named
        }
        if self._is_redone(of_manifest, others):
            return list(others.values())
        return list({**others, **of_manifest}.values())

    def _is_redone(self, of_manifest: dict[str, Receipt], others: dict[str, Receipt]) -> bool:
        """Whether parts that a manifest names are being made again.

        Where the manifest names every slice, other parts may be left over from an earlier run; then only parts that
        were committed during this watch are a sign.
        """
        if not others.keys() & of_manifest.keys():
            return False
        news = any(receipt.part_id in self._new_ids for receipt in others.values())
        return news or len(of_manifest) < len(self._slices)

    def _rate(self, positions: int) -> float | None:
        now = self._clock()
        self._committed += positions
        self._history.append((now, self._committed))
        while now - self._history[0][0] > _SECONDS_OF_RATE:
            self._history.popleft()
        since, committed = self._history[0]
        return (self._committed - committed) / (now - since) if now > since else None

    def _read_lease(self) -> RunSeen | None:
        names = self._store.list(LEASE_FOLDER)
        if not names:
            self._lease = None
            return None
        try:
            content = self._store.read(names[-1])
        except FileNotFoundError:
            return None
        now = self._clock()
        if self._lease is None or self._lease[0] != content:
            self._lease = (content, now)
        try:
            holder = Holder.model_validate_json(content)
        except ValueError:
            return None
        return RunSeen(run=holder.run, host=holder.host, pid=holder.pid, silent_seconds=now - self._lease[1])
