"""The parts of a run: which are missing, what is told while they are made, and the receipts of all in order."""

import os
from pathlib import Path

import pytest

from fakes.targets import FIDELITY
from softshard.cluster.cluster import open_cluster
from softshard.config import ClusterSettings, ThresholdSketch
from softshard.corpus.manifest import CorpusSlice
from softshard.errors import DataInvalid, PartCorrupt, PartsFailed
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool
from softshard.shard.commit import commit_part, receipt_path
from softshard.shard.manifest import Receipt
from softshard.stages.targets.parts import committed, find_missing, score_parts
from softshard.stages.targets.tasks import FoldTeacher, ScoringSpec
from softshard.storage import LocalStore, open_store
from softshard.telemetry import SilentReporter


def some_slices(num, *, first=0):
    return Spool(
        CorpusSlice,
        (
            CorpusSlice(
                path=f"sequences/{number}.parquet",
                split="test" if number % 7 == 6 else "train",
                fold=-1 if number % 7 == 6 else number % 2,
                sha256=f"{number:064x}",
                num_documents=1,
                num_sequences=2,
                num_labels=10 + number,
                num_tokens=20,
                num_bytes_text=50,
            )
            for number in range(first, first + num)
        ),
    )


def a_run(folder):
    teachers = {fold: FoldTeacher(identity={"engine": f"none {fold}"}, adapters=()) for fold in (-1, 0, 1)}
    return ScoringSpec(
        corpus=str(folder / "corpus"),
        targets=str(folder / "targets"),
        teacher=str(folder / "teacher"),
        model=Path("model"),
        device="cpu",
        tokenizer_fingerprint="f" * 64,
        vocab_size=300,
        teachers=teachers,
        sketch=ThresholdSketch(),
        seed=0,
    )


def score(task, *, spec):
    """Commits a part that says which slice it is of."""
    plan, content = spec.part_spec(task.index, task.slice), task.slice.sha256.encode()
    if task.slice.sha256.endswith("3") and first_time(spec, plan):
        raise OSError("the network went away")
    if task.slice.sha256.endswith("5"):
        raise DataInvalid("this slice is wrong")
    receipt = Receipt(
        part_id=plan.part_id,
        path=plan.path,
        split=plan.split,
        fold=plan.fold,
        slice=plan.slice,
        sha256=sha256_hex(content),
        num_bytes=len(content),
        num_sequences=task.slice.num_sequences,
        num_labels=task.slice.num_labels,
        num_head_entries=0,
        num_tail_entries=0,
        label_logprob_sum=0.0,
        fidelity=FIDELITY,
    )
    return commit_part(open_store(spec.targets), content, receipt)


def first_time(spec, plan):
    marker = Path(spec.corpus) / plan.part_id
    marker.parent.mkdir(exist_ok=True)
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Recorder(SilentReporter):
    def __init__(self):
        self.events = []

    def event(self, name, /, **values):
        self.events.append((name, values))

    def of(self, name):
        return [values for found, values in self.events if found == name]


@pytest.fixture(scope="module")
def cluster(scheduler):
    with open_cluster(ClusterSettings(scheduler=scheduler, retry_seconds=0.05)) as running:
        yield running


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "targets")


def compute(cluster, store, run, slices):
    recorder = Recorder()
    score_parts(cluster, run, find_missing(store, run, slices), recorder, score=score)
    return recorder


@pytest.fixture
def done(cluster, store, run):
    """Three parts that are committed."""
    slices = some_slices(3)
    compute(cluster, store, run, slices)
    return slices


def test_what_is_missing_is_computed_and_nothing_else(cluster, store, run, done):
    more = some_slices(5)
    missing = find_missing(store, run, more)
    assert missing.num_parts == 2
    assert missing.num_labels == 13 + 14
    assert missing.first_path == run.part_spec(3, more[3]).path
    recorder = compute(cluster, store, run, more)
    assert {event["part"] for event in recorder.of("part_committed")} == {
        run.part_spec(3, more[3]).part_id,
        run.part_spec(4, more[4]).part_id,
    }
    assert find_missing(store, run, more).num_parts == 0


def test_parts_are_told_with_their_size_when_tried_again_and_when_set_aside(cluster, store, run):
    recorder = Recorder()
    slices = some_slices(7)
    with pytest.raises(PartsFailed, match="this slice is wrong") as caught:
        score_parts(cluster, run, find_missing(store, run, slices), recorder, score=score)
    ids = [run.part_spec(index, part).part_id for index, part in enumerate(slices)]
    told = recorder.of("part_committed")
    assert {event["part"] for event in told} == set(ids) - {ids[5]}
    assert sum(event["positions"] for event in told) == sum(part.num_labels for part in slices) - 15
    assert {(event["bytes"], event["sequences"]) for event in told} == {(64, 2)}
    assert all(event["worker"].startswith("tcp://") and event["seconds"] >= 0 for event in told)
    reason = "OSError: the network went away (attempt 1)"
    assert recorder.of("part_retried") == [{"part": ids[3], "attempt": 1, "reason": reason}]
    reason = "DataInvalid: this slice is wrong (attempt 1)"
    assert recorder.of("part_set_aside") == [{"part": ids[5], "attempt": 1, "reason": reason}]
    assert list(caught.value.failures) == [f"part-{ids[5]}"]


def test_a_worker_gets_fold_after_fold(cluster, store, run):
    missing = find_missing(store, run, some_slices(14))
    folds = [task.slice.fold for task in missing.tasks(run)]
    assert folds == sorted(folds)
    places = [task.index for task in missing.tasks(run) if task.slice.fold == 1]
    assert places == [1, 3, 5, 7, 9, 11]


def test_receipts_come_in_the_order_of_the_corpus(store, run, done):
    assert [receipt.slice for receipt in committed(store, run, done)] == [part.sha256 for part in done]


def test_a_part_that_lies_where_an_older_run_put_it_is_not_computed_again(store, run, done):
    later = Spool(CorpusSlice, [*some_slices(1, first=20), *done])
    missing = find_missing(store, run, later)
    assert missing.num_parts == 1
    assert missing.first_path == run.part_spec(0, later[0]).path


def test_a_part_whose_file_is_gone_is_missing(store, run, done):
    plan = run.part_spec(1, done[1])
    store.remove(plan.path)
    assert find_missing(store, run, done).first_path == plan.path


def test_a_part_without_a_receipt_is_missing(store, run, done):
    plan = run.part_spec(1, done[1])
    store.remove(receipt_path(plan.part_id))
    assert find_missing(store, run, done).first_path == plan.path


def test_a_part_of_another_size_is_named_before_there_is_a_manifest(store, run, done):
    store.replace(run.part_spec(1, done[1]).path, b"short")
    with pytest.raises(PartCorrupt, match="has 5 bytes, its receipt names 64"):
        list(committed(store, run, done))


def test_a_part_that_went_away_after_it_was_committed_is_named(store, run, done):
    store.remove(run.part_spec(2, done[2]).path)
    with pytest.raises(PartCorrupt, match="was committed, and is missing"):
        list(committed(store, run, done))


def test_a_receipt_that_a_listing_shows_is_read_as_one(store, run, done):
    plan = run.part_spec(1, done[1])
    store.remove(plan.path)
    store.replace(receipt_path(plan.part_id), b"{}")
    with pytest.raises(PartCorrupt, match="is not a receipt"):
        find_missing(store, run, done)


def test_the_committed_receipt_is_the_one_on_the_disk(store, run, done):
    for index, (part, receipt) in enumerate(zip(done, committed(store, run, done), strict=True)):
        assert store.read(receipt_path(run.part_spec(index, part).part_id)) == canonical_json(receipt)
