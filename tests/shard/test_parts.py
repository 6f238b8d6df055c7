"""Parts: bytes and back, encodings, what other readers see, and what is said of damaged ones."""

import json
import subprocess
import sys
from dataclasses import replace

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from softshard.config import FullSketch, NucleusSketch, ThresholdSketch, TopkSketch
from softshard.errors import LabelsNotStorable, PartConflict, PartCorrupt
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool
from softshard.shard.card import write_card
from softshard.shard.commit import PartSpec, build_part, commit_part, find_receipt, receipt_path
from softshard.shard.decode import decode_part, open_part
from softshard.shard.manifest import (
    Manifest,
    Receipt,
    SourceRights,
    bytes_per_position,
    mean_fidelity,
    read_manifest,
    write_manifest,
)
from softshard.shard.verify import verify_targets
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.philox import tail_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import TokenSequence
from softshard.storage import LocalStore

VOCAB = 300
KINDS = {
    "threshold": ThresholdSketch(),
    "threshold with draws": ThresholdSketch(tau=1 / 12, draws=3),
    "topk": TopkSketch(kind="topk", k=16),
    "nucleus": NucleusSketch(kind="nucleus", mass=0.9),
    "full": FullSketch(kind="full"),
}


def some_rows(settings, *, num_sequences=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, total = [], FidelitySums()
    for index in range(num_sequences):
        length = 2 + 7 * index
        first_label = 1 if index % 2 == 0 else 2
        token_ids = torch.randint(0, VOCAB, (length,), generator=generator).numpy().astype(np.int32)
        sequence = TokenSequence(
            sequence_id=f"{seed:02d}{index:030d}",
            document_id=f"{index:032d}",
            source="tales",
            style="literary",
            group="someone",
            start=index,
            token_ids=token_ids,
            label_spans=((min(first_label, length - 1), length),),
        )
        logits = torch.randn(sequence.num_labels, VOCAB, generator=generator) * 2.5
        targets, fidelity = sketch_rows(
            logits,
            labels=torch.from_numpy(sequence.labels.astype(np.int64)),
            uniforms=tail_uniforms([sequence], seed=seed, draws=getattr(settings, "draws", 1)),
            settings=settings,
            vocab_size=VOCAB,
            places=[(sequence.sequence_id, j) for j in range(sequence.num_labels)],
        )
        rows.append((sequence, targets))
        total += fidelity
    return rows, total


def a_plan(settings, **changes):
    values = {
        "index": 0,
        "split": "train",
        "fold": 0,
        "slice": "a" * 64,
        "tokenizer_fingerprint": "f" * 64,
        "vocab_size": VOCAB,
        "teacher": {"engine": "transformers", "num_threads": 1},
        "sketch": settings,
        "seed": 0,
    }
    return PartSpec(**{**values, **changes})


@pytest.mark.parametrize("spans", [((1, 20),), ((1, 4), (9, 30)), ((2, 3), (5, 6))])
def test_labels_that_do_not_run_to_the_end_are_refused_by_version_1(spans):
    rows, fidelity = some_rows(KINDS["threshold"])
    tokens, targets = rows[4]
    rows[4] = replace(tokens, label_spans=spans), targets
    with pytest.raises(LabelsNotStorable, match=rf"sequence {tokens.sequence_id}: .* of 30, and format version 1"):
        build_part(a_plan(KINDS["threshold"]), rows, fidelity)


def committed(store, settings=KINDS["threshold"], *, seeds=(0,)):
    receipts = []
    for index, seed in enumerate(seeds):
        rows, fidelity = some_rows(settings, seed=seed)
        split = "train" if index % 2 == 0 else "test"
        plan = a_plan(settings, index=index, split=split, slice=f"{seed:064d}")
        receipts.append(commit_part(store, *build_part(plan, rows, fidelity)))
    manifest = Manifest(
        schema_version=1,
        job="test",
        corpus="c" * 64,
        sources=(SourceRights(name="tales", style="literary", license="CC0-1.0", rights_basis="public-domain"),),
        tokenizer_fingerprint="f" * 64,
        vocab_size=VOCAB,
        context_tokens=64,
        overlap_tokens=2,
        target=settings.model_dump(mode="json"),
        seed=0,
        teacher={"engine": "transformers"},
        fidelity=mean_fidelity(receipts),
        bytes_per_position=bytes_per_position(receipts),
        parts=tuple(receipts),
    )
    write_manifest(store, manifest)
    write_card(store, manifest)
    return manifest


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_gives_the_rows_within_the_step_and_the_grids(kind):
    settings = KINDS[kind]
    rows, fidelity = some_rows(settings)
    content, receipt = build_part(a_plan(settings), rows, fidelity)
    again, metadata = decode_part(content, uri="part")
    assert metadata.kind == settings.kind
    assert receipt.num_bytes == len(content)
    assert receipt.num_labels == sum(sequence.num_labels for sequence, _ in rows)
    for (sequence, targets), (read_sequence, read_targets) in zip(rows, again, strict=True):
        assert read_sequence.sequence_id == sequence.sequence_id
        np.testing.assert_array_equal(read_sequence.token_ids, sequence.token_ids)
        for name in ("head_count", "tail_count", "head_ids"):
            np.testing.assert_array_equal(getattr(read_targets, name), getattr(targets, name))
        assert sorted_tails(read_targets) == sorted_tails(targets)
        highest = np.repeat(np.maximum.reduceat(targets.head_logprobs, starts_of(targets)), heads_of(targets))
        np.testing.assert_allclose(
            read_targets.head_logprobs, targets.head_logprobs - highest, atol=settings.step / 2 + 1e-5
        )
        np.testing.assert_allclose(read_targets.label_logprob, targets.label_logprob, atol=1 / 32)
        np.testing.assert_allclose(read_targets.tail_mass, targets.tail_mass, atol=1 / 510 + 1e-7)


def heads_of(targets):
    return targets.head_count[targets.head_count > 0]


def starts_of(targets):
    return (np.cumsum(targets.head_count) - targets.head_count)[targets.head_count > 0]


def sorted_tails(targets):
    return [sorted(ids.tolist()) for ids in np.split(targets.tail_ids, np.cumsum(targets.tail_count)[:-1])]


def test_same_rows_give_the_same_bytes():
    first, second = (build_part(a_plan(KINDS["threshold"]), *some_rows(KINDS["threshold"])) for _ in range(2))
    assert first == second


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


def test_columns_are_encoded_as_asked():
    content, _ = build_part(a_plan(KINDS["threshold"]), *some_rows(KINDS["threshold"]))
    file, _ = open_part(content, uri="part")
    group = file.metadata.row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    for name in ("token_ids", "tail_count", "head_ranks", "head_steps", "tail_gaps"):
        assert "BYTE_STREAM_SPLIT" in encodings[f"{name}.list.element"]
    for name in ("label_logprob", "entropy", "tail_mass", "head_count"):
        assert "RLE_DICTIONARY" in encodings[f"{name}.list.element"]
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_polars_duckdb_and_pyarrow_read_the_same_rows(tmp_path):
    manifest = committed(LocalStore(tmp_path))
    path = tmp_path / manifest.parts[0].path
    arrow = pq.read_table(path).to_pylist()
    assert pl.read_parquet(path).to_dicts() == arrow
    names = list(arrow[0])
    by_duckdb = duckdb.execute(f"select * from '{path}'").fetchall()
    assert [dict(zip(names, row, strict=True)) for row in by_duckdb] == arrow


def test_datasets_gives_the_splits_with_no_code_of_ours(tmp_path):
    manifest = committed(LocalStore(tmp_path / "targets"), seeds=(0, 1, 2))
    script = (
        "import sys, datasets; assert not any(name.startswith('softshard') for name in sys.modules);"
        f"d = datasets.load_dataset({str(tmp_path / 'targets')!r}, cache_dir={str(tmp_path / 'cache')!r});"
        "print({split: rows.num_rows for split, rows in d.items()}, sum(len(x) for x in d['train']['tail_gaps']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tails = sum(part.num_tail_entries for part in manifest.of_split("train"))
    assert result.stdout.strip() == f"{{'train': 10, 'test': 5}} {tails}"


def test_card_names_the_files_where_others_lie_beside_them(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store, seeds=(0, 1))
    assert "data/train/*.parquet" in (tmp_path / "README.md").read_text()
    (tmp_path / "data/train/part-00000-of-an-earlier-run.parquet").write_bytes(b"old")
    write_card(store, manifest)
    card = (tmp_path / "README.md").read_text()
    assert manifest.parts[0].path in card
    assert "data/train/*.parquet\n" not in card.split("```")[0]


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


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_what_is_not_parquet_is_named(content):
    with pytest.raises(PartCorrupt, match=r"some/part\.parquet: is not readable as Parquet"):
        decode_part(content, uri="some/part.parquet")


def test_parquet_of_someone_else_is_refused(tmp_path):
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(PartCorrupt, match="no softshard metadata"):
        decode_part((tmp_path / "x.parquet").read_bytes(), uri="x")


def test_manifest_that_is_not_what_its_pointer_names_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    path = tmp_path / f"manifests/{manifest.digest}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PartCorrupt, match="digest"):
        read_manifest(store)


def test_written_manifest_is_read_back_and_written_once(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    assert read_manifest(store) == manifest
    assert write_manifest(store, manifest) is False
