"""Ids of parts, and how a part is committed: the first one wins, and nothing is overwritten."""

from __future__ import annotations

import pytest

from fakes.parts import KINDS, a_plan, some_rows
from softshard.config import ThresholdSketch
from softshard.errors import PartConflict
from softshard.shard.commit import build_part, commit_part, find_receipt
from softshard.storage import LocalStore


@pytest.mark.parametrize(
    "change",
    [
        {"slice": "b" * 64},
        {"fold": 1},
        {"split": "test"},
        {"tokenizer_fingerprint": "e" * 64},
        {"teacher": {"engine": "transformers", "num_threads": 2}},
        {"sketch": ThresholdSketch(tau=1 / 25)},
        {"sketch": ThresholdSketch(draws=2)},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_part_id_changes_with_everything_that_can_change_the_bytes(change):
    assert a_plan(KINDS["threshold"]).part_id != a_plan(KINDS["threshold"], **change).part_id


def test_part_id_does_not_change_with_the_place_in_the_corpus():
    assert a_plan(KINDS["threshold"]).part_id == a_plan(KINDS["threshold"], index=7).part_id


def test_first_commit_wins_and_another_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    rows, fidelity = some_rows(KINDS["threshold"])
    content, receipt = build_part(a_plan(KINDS["threshold"]), rows, fidelity)
    assert commit_part(store, content, receipt) == receipt
    assert commit_part(store, content, receipt) == receipt
    with pytest.raises(PartConflict, match="nothing was overwritten"):
        commit_part(store, content + b"x", receipt)
    assert store.read(receipt.path) == content


def test_part_without_receipt_is_not_committed_and_is_adopted(tmp_path):
    store = LocalStore(tmp_path)
    content, receipt = build_part(a_plan(KINDS["threshold"]), *some_rows(KINDS["threshold"]))
    store.put_once(receipt.path, content)
    assert find_receipt(store, receipt.part_id) is None
    assert commit_part(store, content, receipt) == receipt
    assert find_receipt(store, receipt.part_id) == receipt


def test_receipt_without_part_is_computed_again(tmp_path):
    store = LocalStore(tmp_path)
    content, receipt = build_part(a_plan(KINDS["threshold"]), *some_rows(KINDS["threshold"]))
    commit_part(store, content, receipt)
    (tmp_path / receipt.path).unlink()
    assert find_receipt(store, receipt.part_id) is None


def test_part_lost_and_computed_to_other_bytes_is_a_conflict_and_not_believed(tmp_path):
    store = LocalStore(tmp_path)
    rows, fidelity = some_rows(KINDS["threshold"])
    content, receipt = build_part(a_plan(KINDS["threshold"]), rows, fidelity)
    commit_part(store, content, receipt)
    (tmp_path / receipt.path).unlink()
    other = receipt.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(PartConflict, match=receipt.part_id):
        commit_part(store, content + b"x", other)
    assert not store.exists(receipt.path)
    assert commit_part(store, content, receipt) == receipt
    assert store.read(receipt.path) == content
