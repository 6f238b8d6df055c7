"""The parts of a run: finding those that are missing, computing them on a cluster, and reading all receipts in order.

One slice of the corpus and the tasks in flight are held at a time; which parts are missing takes one byte per part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from softshard.cluster.cluster import Cluster
from softshard.cluster.task_queue import Execution
from softshard.corpus.manifest import CorpusSlice
from softshard.errors import PartCorrupt, PartsFailed
from softshard.shard.commit import find_receipt, receipt_path
from softshard.shard.manifest import Receipt, read_receipt
from softshard.stages.targets.tasks import ScoreTask, ScoringSpec, score_part
from softshard.storage import Store
from softshard.telemetry import Reporter

__all__ = ["Missing", "committed", "find_missing", "score_parts"]

_READERS, _READ_AHEAD = 16, 256
"""Receipts are small, and reading one from an object store is a request, so many are read at a time, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Parts of a run that are not committed."""

    slices: Sequence[CorpusSlice]
    """All slices of the corpus, in its order."""
    flags: bytearray
    """1 for each slice whose part is missing."""
    num_parts: int
    num_labels: int
    first_path: str
    """Path of the first missing part; empty where none is missing."""

    def tasks(self, spec: ScoringSpec) -> Iterator[ScoreTask]:
        """The missing parts, fold by fold so that workers keep their engine, in the corpus's order within a fold."""
        for fold in sorted(spec.teachers):
            for index, part in enumerate(self.slices):
                if self.flags[index] and part.fold == fold:
                    yield ScoreTask(index=index, part_id=spec.part_spec(index, part).part_id, slice=part)


def find_missing(store: Store, spec: ScoringSpec, slices: Sequence[CorpusSlice]) -> Missing:
    """The parts that have no receipt, or whose file is missing.

    Lists two folders, and reads a receipt only where the part is not at the path that this run would give it.
    """
    receipts, files = set(store.list("receipts")), set(store.list("data"))
    flags = bytearray(len(slices))
    num_labels, first_path = 0, ""
    for index, part in enumerate(slices):
        expected = spec.part_spec(index, part)
        receipt = receipt_path(expected.part_id)
        if receipt in receipts and (expected.path in files or read_receipt(store, receipt).path in files):
            continue
        flags[index] = 1
        num_labels += part.num_labels
        first_path = first_path or expected.path
    return Missing(slices=slices, flags=flags, num_parts=sum(flags), num_labels=num_labels, first_path=first_path)


def score_parts(
    cluster: Cluster,
    spec: ScoringSpec,
    missing: Missing,
    reporter: Reporter,
    *,
    score: Callable[..., Receipt] = score_part,
) -> None:
    """Compute the missing parts on a cluster.

    Args:
        cluster: executes the tasks.
        spec: what all parts of the run share.
        missing: the parts to compute.
        reporter: gets an event for every part that is committed, tried again or set aside.
        score: called on a worker with a `ScoreTask` and `spec`; commits the part.

    Raises:
        PartsFailed: some parts were set aside; the others are committed.
        Stopped: a signal ended the run.
    """
    done = num_done = 0
    with reporter.progress("targets", total=missing.num_labels, unit="positions") as progress:

        def on_result(task: ScoreTask, receipt: Receipt, execution: Execution) -> None:
            nonlocal done, num_done
            done += receipt.num_labels
            num_done += 1
            reporter.event(
                "part_committed",
                part=receipt.part_id,
                positions=receipt.num_labels,
                bytes=receipt.num_bytes,
                sequences=receipt.num_sequences,
                seconds=round(execution.seconds, 3),
                worker=execution.worker,
            )
            progress(done, note=f"{num_done}/{missing.num_parts} parts")

        failures = cluster.map_tasks(
            partial(score, spec=spec),
            missing.tasks(spec),
            name=lambda task: f"part-{task.part_id}",
            on_result=on_result,
            on_retry=lambda task, attempt, reason: reporter.event(
                "part_retried", part=task.part_id, attempt=attempt, reason=reason
            ),
            on_set_aside=lambda task, attempt, reason: reporter.event(
                "part_set_aside", part=task.part_id, attempt=attempt, reason=reason
            ),
        )
    if failures:
        raise PartsFailed(failures=failures, out=spec.targets)


def committed(store: Store, spec: ScoringSpec, slices: Iterable[CorpusSlice]) -> Iterator[Receipt]:
    """Receipts of all parts, in the corpus's order.

    Raises:
        PartCorrupt: a receipt cannot be read, or its part is missing or has another size than it names.
    """

    def read(place: tuple[int, CorpusSlice]) -> Receipt:
        part = spec.part_spec(*place)
        receipt = find_receipt(store, part.part_id)
        if receipt is None:
            raise PartCorrupt(uri=f"{store.uri}/{part.path}", problem="was committed, and is missing")
        return receipt

    places = enumerate(slices)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="softshard-receipts") as readers:
        while ahead := list(itertools.islice(places, _READ_AHEAD)):
            yield from readers.map(read, ahead)
