"""Bytes of a part and back: the round trip, the encodings, what other readers see, and what is no part."""

from __future__ import annotations

import io
import subprocess
import sys

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from fakes.parts import KINDS, a_plan, committed, some_rows
from softshard.config import ThresholdSketch, parse_sketch
from softshard.errors import PartCorrupt
from softshard.shard.commit import build_part
from softshard.shard.decode import decode_part, open_part
from softshard.storage import LocalStore


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


OLD = {"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY"}
"""Encodings that every reader of Parquet has known for years."""


def test_portable_part_has_the_same_values_in_encodings_that_old_readers_know(tmp_path):
    compact, portable = KINDS["threshold"], KINDS["threshold"].model_copy(update={"encoding": "portable"})
    rows, fidelity = some_rows(compact)
    parts = [build_part(a_plan(settings), rows, fidelity) for settings in (compact, portable)]
    tables = [pq.read_table(io.BytesIO(content)) for content, _ in parts]
    assert tables[0].equals(tables[1])
    group = pq.ParquetFile(io.BytesIO(parts[1][0])).metadata.row_group(0)
    assert {name for i in range(group.num_columns) for name in group.column(i).encodings} <= OLD
    assert parts[0][1].part_id != parts[1][1].part_id, "a run that is resumed with the other encoding mixes none"


def test_encoding_that_is_not_set_leaves_the_settings_of_a_sketch_as_they_were():
    assert "encoding" not in ThresholdSketch().model_dump(mode="json")
    assert ThresholdSketch(encoding="portable").model_dump(mode="json")["encoding"] == "portable"
    assert parse_sketch({"kind": "topk", "k": 8, "encoding": "portable"}).encoding == "portable"


@pytest.mark.parametrize("kind", KINDS)
def test_pilot_measures_parts_in_the_encoding_of_the_job(kind):
    like = KINDS[kind].model_copy(update={"encoding": "portable", "temperature": 0.5})
    ladder = type(like).pilot_ladder(like, vocab_size=64)
    assert ladder
    assert {(settings.encoding, settings.temperature) for settings in ladder} == {("portable", 0.5)}


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


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_what_is_not_parquet_is_named(content):
    with pytest.raises(PartCorrupt, match=r"some/part\.parquet: is not readable as Parquet"):
        decode_part(content, uri="some/part.parquet")


def test_parquet_of_someone_else_is_refused(tmp_path):
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(PartCorrupt, match="no softshard metadata"):
        decode_part((tmp_path / "x.parquet").read_bytes(), uri="x")
