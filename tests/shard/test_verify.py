"""Verification of targets: what is whole passes, and damage is found and named."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes.parts import KINDS, VOCAB, committed
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import Receipt, write_manifest
from softshard.shard.verify import verify_targets
from softshard.storage import LocalStore


def test_whole_output_verifies(tmp_path):
    committed(LocalStore(tmp_path), seeds=(0, 1, 2))
    verification = verify_targets(LocalStore(tmp_path), deep=True)
    assert verification.problems == ()
    assert verification.unnamed == ()
    assert verification.num_parts == 3


@pytest.mark.parametrize("kind", KINDS)
def test_deep_verification_accepts_every_kind(tmp_path, kind):
    committed(LocalStore(tmp_path), KINDS[kind])
    assert verify_targets(LocalStore(tmp_path), deep=True).problems == ()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "swapped", "no receipt"])
def test_damage_is_found_and_named(tmp_path, damage):
    store = LocalStore(tmp_path)
    manifest = committed(store, seeds=(0, 1, 2))
    part, other = manifest.parts[0], manifest.parts[2]
    path = tmp_path / part.path
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "missing":
        path.unlink()
    elif damage == "swapped":
        path.write_bytes((tmp_path / other.path).read_bytes())
    else:
        (tmp_path / f"receipts/{part.part_id}.json").unlink()
    problems = verify_targets(store).problems
    assert len(problems) == 1
    assert (part.part_id if damage == "no receipt" else part.path) in problems[0]


def first_with(row, name, least):
    """Index of the first label with so many entries, and the place of its first one."""
    counts = np.array(row[name])
    label = int(np.argmax(counts >= least))
    return label, int(counts[:label].sum())


def twice_in_tail(row, metadata):
    row["tail_gaps"][first_with(row, "tail_count", 2)[1] + 1] = 0


def twice_in_head(row, metadata):
    start = first_with(row, "head_count", 2)[1]
    row["head_ranks"][start + 1] = row["head_ranks"][start]


def backward_gap(row, metadata):
    row["tail_gaps"][first_with(row, "tail_count", 2)[1] + 1] = -1


def rising_head(row, metadata):
    row["head_steps"][0] = -3


def changed(name, value):
    return lambda row, metadata: row[name].__setitem__(0, value)


def said(name, value):
    return lambda row, metadata: metadata.__setitem__(name, value)


@pytest.mark.parametrize(
    "damage",
    [
        twice_in_tail,
        twice_in_head,
        backward_gap,
        rising_head,
        changed("tail_mass", float("nan")),
        changed("tail_mass", 0.99),
        changed("entropy", -3.0),
        changed("entropy", float("nan")),
        changed("label_logprob", 5.0),
        changed("token_ids", 999_999),
        changed("head_ranks", VOCAB),
        said("frequent_ids", [3, 3]),
        said("frequent_ids", [-1]),
        said("frequent_ids", [2**40]),
        said("draws", 0),
        said("draws", 2),
        said("step", 0),
        said("step", 0.02),
        said("tau", None),
        said("tau", 0.5),
        said("kind", "topk"),
        said("vocab_size", -5),
        said("vocab_size", 20),
        said("seed", 7),
    ],
)
def test_deep_verification_finds_what_a_hash_cannot(tmp_path, damage):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    part = manifest.parts[0]
    table = pq.read_table(tmp_path / part.path)
    metadata = json.loads(table.schema.metadata[b"softshard"])
    rows = table.to_pylist()
    damage(rows[-1], metadata)
    table = pa.Table.from_pylist(rows, schema=table.schema.with_metadata({"softshard": json.dumps(metadata)}))
    pq.write_table(table, tmp_path / part.path)
    content = (tmp_path / part.path).read_bytes()
    receipt = part.model_copy(update={"sha256": sha256_hex(content), "num_bytes": len(content)})
    store.replace(receipt_path(part.part_id), canonical_json(receipt))
    write_manifest(store, manifest.model_copy(update={"parts": Spool(Receipt, [receipt])}))
    problems = verify_targets(store, deep=True).problems
    assert problems
    assert all(part.path in problem for problem in problems)
