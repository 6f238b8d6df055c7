"""The parts of a run: which are missing, computed on a cluster, and the receipts of all of them in the corpus's order.

In: what the parts share, and the slices of the corpus. Guaranteed: one slice, and what is in flight, is held at a time;
a bit a part remembers which are missing.
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
"""Receipts are small, and in an object store each is a request: many at a time, in order all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Parts of a run that are not committed."""

    slices: Sequence[CorpusSlice]
    """All of the corpus, in its order."""
    flags: bytearray
    """1 for each slice whose part is missing."""
    num_parts: int
    num_labels: int
    first_path: str
    """Where the first of them will be; empty where none is missing."""

    def tasks(self, run: ScoringSpec) -> Iterator[ScoreTask]:
        """The missing parts, fold after fold so that a worker keeps its engine, in the corpus's order within each."""
        for fold in sorted(run.teachers):
            for index, part in enumerate(self.slices):
                if self.flags[index] and part.fold == fold:
                    yield ScoreTask(index=index, part_id=run.plan(index, part).part_id, slice=part)


def find_missing(store: Store, run: ScoringSpec, slices: Sequence[CorpusSlice]) -> Missing:
    """Which parts have no receipt, or one whose file is gone. Two listings, and a receipt only where it may say that
    the part lies elsewhere than a run of today would put it."""
    receipts, files = set(store.list("receipts")), set(store.list("data"))
    flags = bytearray(len(slices))
    num_labels, first_path = 0, ""
    for index, part in enumerate(slices):
        plan = run.plan(index, part)
        receipt = receipt_path(plan.part_id)
        if receipt in receipts and (plan.path in files or read_receipt(store, receipt).path in files):
            continue
        flags[index] = 1
        num_labels += part.num_labels
        first_path = first_path or plan.path
    return Missing(slices=slices, flags=flags, num_parts=sum(flags), num_labels=num_labels, first_path=first_path)


def score_parts(
    cluster: Cluster,
    run: ScoringSpec,
    missing: Missing,
    reporter: Reporter,
    *,
    score: Callable[..., Receipt] = score_part,
) -> None:
    """Compute what is missing.

    Args:
        cluster: where.
        run: what the parts share.
        missing: which parts.
        reporter: is told of every part that is committed, tried again or set aside.
        score: called on a worker with a `ScoreTask` and `run`; commits the part.

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
            partial(score, run=run),
            missing.tasks(run),
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
        raise PartsFailed(failures=failures, out=run.targets)


def committed(store: Store, run: ScoringSpec, slices: Iterable[CorpusSlice]) -> Iterator[Receipt]:
    """Receipts of all parts, in the corpus's order.

    Raises:
        PartCorrupt: a receipt cannot be read, or its part is gone or has another size than it names.
    """

    def receipt_of(place: tuple[int, CorpusSlice]) -> Receipt:
        plan = run.plan(*place)
        receipt = find_receipt(store, plan.part_id)
        if receipt is None:
            raise PartCorrupt(uri=f"{store.uri}/{plan.path}", problem="was committed, and is gone")
        return receipt

    places = enumerate(slices)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="softshard-receipts") as readers:
        while ahead := list(itertools.islice(places, _READ_AHEAD)):
            yield from readers.map(receipt_of, ahead)
