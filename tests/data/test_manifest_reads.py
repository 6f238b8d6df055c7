"""How often a data set reads the receipts of its manifest, which may be many thousands in a temporary file."""

import itertools

import numpy as np
import pytest

from fakes.targets import numbered_parts, write_targets
from softshard.data.dataset import SoftLabelDataset
from softshard.data.target_set import TargetSet
from softshard.records.spool import Spool
from softshard.shard.manifest import read_manifest, write_manifest


@pytest.fixture
def passes(monkeypatch):
    """Passes over a spool from its beginning, and reads of single records."""
    counted = []
    lines, at = Spool.lines, Spool._at
    monkeypatch.setattr(Spool, "lines", lambda spool: (counted.append("pass"), lines(spool))[1])
    monkeypatch.setattr(Spool, "_at", lambda spool, place: (counted.append(place), at(spool, place))[1])
    return counted


def test_a_data_set_reads_its_receipts_once_for_all_epochs(tmp_path, passes):
    store, written = write_targets(tmp_path, numbered_parts(np.random.default_rng(0), (5, 4, 3)))
    write_manifest(store, written)
    manifest = read_manifest(store)
    passes.clear()
    data = SoftLabelDataset(
        TargetSet(store=store, manifest=manifest), seed=0, batch_tokens=16, shuffle_buffer=4, alpha=0.5, prefetch=0
    )
    for epoch in range(4):
        assert len(list(itertools.islice(data, data.batches_per_epoch(epoch)))) > 1
    assert data.state_dict()["epoch"] >= 3
    assert passes == ["pass"]


def test_a_manifest_is_checked_against_its_name_in_one_pass(tmp_path, passes):
    store, written = write_targets(tmp_path, numbered_parts(np.random.default_rng(0), (2, 2)))
    write_manifest(store, written)
    passes.clear()
    manifest = read_manifest(store)
    assert passes == ["pass"]
    assert manifest.digest == written.digest
    assert passes == ["pass"]
    assert [manifest.totals.num_parts, manifest.totals.num_sequences] == [2, 4]
    assert manifest.totals.num_bytes == sum(part.num_bytes for part in written.parts)
