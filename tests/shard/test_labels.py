"""Parts of version 2: labels anywhere in a sequence, stored and read back, by softshard and by others."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fakes.parts import KINDS, a_plan, some_rows
from fakes.targets import conversations, metadata, row, sequence, write_targets
from softshard.config import FullSketch
from softshard.errors import PartCorrupt
from softshard.shard.commit import build_part
from softshard.shard.decode import decode_part
from softshard.shard.encode import encode_part
from softshard.shard.labels import label_runs, needed_version
from softshard.shard.read import PartReader, read_rows
from softshard.teacher.engines import open_teacher, teacher_identity

PAGE = Path(__file__).parents[2] / "docs/format.md"


def encoded(rows, *, version=2, kind="threshold"):
    return encode_part(rows, fold=0, metadata=metadata(kind, version=version))


def marks(length, spans):
    """For each token, whether it is a label."""
    return [any(start <= place < stop for start, stop in spans) for place in range(length)]


@st.composite
def masked(draw):
    """Some sequences, each by whether its tokens are labels; the first never is one, another is."""
    each = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)
    return [[False, *mask] for mask in draw(st.lists(each, min_size=1, max_size=5))]


@settings(max_examples=40, deadline=None)
@given(masked())
def test_any_labels_come_back_row_by_row_and_in_blocks(masks):
    rng = np.random.default_rng(len(masks))
    rows = []
    for number, mask in enumerate(masks):
        bounds = np.flatnonzero(np.diff([0, *map(int, mask), 0])).reshape(-1, 2).tolist()
        spans = tuple(map(tuple, bounds))
        rows.append(row(f"{number:032d}", len(mask), rng, label_spans=spans))
    content = encoded(rows)
    again, _ = decode_part(content, uri="part")
    for (tokens, targets), (read, read_targets) in zip(rows, again, strict=True):
        assert read.label_spans == tokens.label_spans
        np.testing.assert_array_equal(read.token_ids, tokens.token_ids)
        np.testing.assert_array_equal(read_targets.head_ids, targets.head_ids)
        np.testing.assert_array_equal(read_targets.tail_count, targets.tail_count)
    (block,) = PartReader(content, uri="part").blocks(0, with_scores=True)
    flat = np.concatenate([np.array(mask) for mask in masks])
    assert block.label_indices.tolist() == np.flatnonzero(flat).tolist()
    assert block.label_counts.tolist() == [sum(mask) for mask in masks]
    np.testing.assert_array_equal(block.targets.head_ids, np.concatenate([targets.head_ids for _, targets in rows]))


def test_spans_that_touch_are_stored_as_one():
    tokens = sequence("a", range(12), label_spans=((2, 4), (4, 5), (5, 6), (9, 10), (10, 12)))
    assert label_runs(tokens) == [2, 4, 3, 3]
    assert needed_version([tokens]) == 2
    assert needed_version([replace(tokens, label_spans=((2, 4), (4, 12)))]) == 1


@pytest.mark.parametrize("spans", [((1, 20),), ((1, 4), (9, 30)), ((2, 3), (5, 6))])
def test_version_1_refuses_labels_that_do_not_run_to_the_end(spans):
    rows, fidelity = some_rows(KINDS["threshold"])
    tokens, targets = rows[4]
    rows[4] = replace(tokens, label_spans=spans), targets
    with pytest.raises(ValueError, match=rf"{tokens.sequence_id}: .* of 30 tokens, which needs schema version 2"):
        build_part(a_plan(KINDS["threshold"]), rows, fidelity)


def test_part_names_its_version_and_the_version_is_part_of_its_id():
    rows, fidelity = some_rows(KINDS["threshold"])
    parts = [build_part(a_plan(KINDS["threshold"], schema_version=version), rows, fidelity) for version in (1, 2)]
    assert parts[0][1].part_id != parts[1][1].part_id
    for version, (content, _) in enumerate(parts, start=1):
        again, read = decode_part(content, uri="part")
        assert read.schema_version == version
        assert [tokens.label_spans for tokens, _ in again] == [tokens.label_spans for tokens, _ in rows]


@pytest.mark.parametrize("encoding", ["compact", "portable"])
def test_same_labels_take_the_same_bytes_in_both_versions_but_for_the_spans(encoding):
    rng = np.random.default_rng(0)
    rows = [row(f"{number:032d}", int(rng.integers(60, 120)), rng, kind="topk") for number in range(40)]
    sizes = [
        len(encode_part(rows, fold=0, metadata=metadata("topk", version=version), encoding=encoding))
        for version in (1, 2)
    ]
    runs = 2 * 4 * len(rows)
    assert sizes[1] - sizes[0] < 200 + runs, "the footer of a list and two numbers a sequence"


def test_answers_of_a_conversation_take_fewer_bytes_than_one_sequence_for_each():
    rng = np.random.default_rng(0)
    spans = ((20, 40), (60, 80), (100, 120))
    together = [row(f"{number:032d}", 120, rng, kind="topk", label_spans=spans) for number in range(20)]
    cut = []
    for tokens, targets in together:
        for place, (start, stop) in enumerate(spans):
            labels = slice(20 * place, 20 * place + 20)
            own = {name: getattr(targets, name)[labels] for name in ("label_logprob", "entropy", "tail_mass")}
            own |= {name: getattr(targets, name)[labels] for name in ("head_count", "tail_count")}
            heads = slice(100 * place, 100 * place + 100)
            own |= {name: getattr(targets, name)[heads] for name in ("head_ids", "head_logprobs")}
            whole = replace(tokens, token_ids=tokens.token_ids[:stop], label_spans=((start, stop),))
            cut.append((whole, replace(targets, **own)))
    assert len(encoded(together, kind="topk")) < len(encoded(cut, version=1, kind="topk"))


def rewritten(content, *, runs=None, **changes):
    """A part with other runs in its first row, or with other values in its metadata."""
    table = pq.read_table(io.BytesIO(content))
    said = json.loads(pq.read_metadata(io.BytesIO(content)).metadata[b"softshard"]) | changes
    if runs is not None:
        place = table.schema.get_field_index("label_runs")
        values = [runs, *table["label_runs"].to_pylist()[1:]]
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema.remove_metadata(), store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"softshard": json.dumps(said).encode()})
    return sink.getvalue()


@pytest.mark.parametrize(
    "runs",
    [[], [12], [0, 3, 9], [1, 0, 2, 3, 6], [1, 3, 7], [1, 3, 9], [-1, 3, 10], [2**31 - 1, 1, 2**31 - 1]],
    ids=["none", "context alone", "label first", "empty", "too few", "too many", "negative", "overflow"],
)
def test_runs_that_are_not_the_tokens_are_refused_by_name(runs):
    rows = [row(f"{number:032d}", 12, np.random.default_rng(0), label_spans=((1, 4),)) for number in range(2)]
    content = rewritten(encoded(rows), runs=runs)
    for read in (lambda: decode_part(content, uri="part"), lambda: list(PartReader(content, uri="part").blocks(0))):
        with pytest.raises(PartCorrupt, match=r"part: .*its runs of labels do not match its tokens"):
            read()


def test_runs_with_another_number_of_labels_are_refused():
    rows = [row("0" * 32, 12, np.random.default_rng(0), label_spans=((1, 4),))]
    with pytest.raises(PartCorrupt, match=f"sequence {'0' * 32}: label_logprob does not match its tokens"):
        decode_part(rewritten(encoded(rows), runs=[1, 4, 7]), uri="part")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (3, "has schema version 3, this softshard reads 1 and 2"),
        (True, "has schema version True"),
        (1, "its columns are not those of schema version 1"),
    ],
)
def test_part_of_a_version_that_it_is_not_is_refused(version, problem):
    content = rewritten(encoded(conversations(np.random.default_rng(0), 2)), schema_version=version)
    with pytest.raises(PartCorrupt, match=problem):
        decode_part(content, uri="part")


@pytest.mark.parametrize("encoding", ["compact", "portable"])
def test_others_read_the_runs_without_softshard(tmp_path, encoding):
    rows = conversations(np.random.default_rng(0), 6)
    path = tmp_path / "part.parquet"
    path.write_bytes(encode_part(rows, fold=0, metadata=metadata(version=2), encoding=encoding))
    arrow = pq.read_table(path).to_pylist()
    assert pl.read_parquet(path).to_dicts() == arrow
    by_duckdb = duckdb.execute(f"select * from '{path}'").fetchall()
    assert [dict(zip(arrow[0], values, strict=True)) for values in by_duckdb] == arrow
    for values, (tokens, _) in zip(arrow, rows, strict=True):
        mask = [turn % 2 == 1 for turn, length in enumerate(values["label_runs"]) for _ in range(length)]
        assert mask == marks(len(tokens.token_ids), tokens.label_spans)
        assert "first_label" not in values


def test_datasets_reads_a_set_of_version_2_with_no_code_of_ours(tmp_path):
    from datasets import Features, List, Value, load_dataset

    rows = conversations(np.random.default_rng(0), 6)
    write_targets(tmp_path / "targets", [rows[:4], rows[4:]])
    files = str(tmp_path / "targets/data/train/*.parquet")
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features, Features)
    assert loaded.features["label_runs"] == List(Value("int32"))
    assert [sum(runs[1::2]) for runs in loaded["label_runs"]] == [tokens.num_labels for tokens, _ in rows]


def test_ten_lines_give_the_models_distributions_at_each_answer_and_nowhere_else(tmp_path, tiny_model):
    """Scored by an engine, built into a part, read by polars and decoded by the lines of the page."""
    rng = np.random.default_rng(4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    vocab = model.config.vocab_size
    spans = (((3, 7), (11, 12), (15, 19)), ((1, 4),), ((2, 5), (8, 20)))
    asked = [
        replace(sequence(f"{number:032d}", rng.integers(vocab, size=20)), label_spans=own)
        for number, own in enumerate(spans)
    ]
    kind = FullSketch(kind="full")
    identity = teacher_identity(job_teacher(tiny_model), context_tokens=32, weights="w", adapters=())
    teacher = open_teacher(tiny_model, adapters=(), identity=identity, device="cpu", vocab_size=vocab)
    scored, fidelity = teacher.score(asked, sketch=kind, seed=0)
    plan = a_plan(kind, schema_version=needed_version(asked), vocab_size=vocab)
    content, receipt = build_part(plan, list(zip(asked, scored, strict=True)), fidelity)
    path = tmp_path / "part.parquet"
    path.write_bytes(content)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    scope = {}
    exec(code, scope)
    found = scope["targets"](path)
    for tokens in asked:
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.token_ids.astype(np.int64))[None]).logits[0, :, :vocab]
        exact = torch.softmax(logits, -1).numpy()
        for place, is_label in enumerate(marks(20, tokens.label_spans)):
            if is_label:
                sequence_id, label, ids, weights = next(found)
                assert (sequence_id, label) == (tokens.sequence_id, tokens.token_ids[place])
                assert sorted(ids.tolist()) == list(range(vocab))
                np.testing.assert_allclose(weights, exact[place - 1, ids], rtol=0.03)
    assert next(found, None) is None
    assert receipt.num_labels == 9 + 3 + 15


def job_teacher(model):
    from softshard.config import TeacherSettings

    return TeacherSettings.model_validate({"model": str(model), "folds": 0, "dtype": "float32"})


def test_rows_of_a_set_are_read_in_its_version(tmp_path):
    rows = conversations(np.random.default_rng(0), 9)
    store, manifest = write_targets(tmp_path, [rows[:5], rows[5:]])
    read = [tokens for receipt in manifest.parts for (tokens, _), _ in read_rows(store, receipt)]
    assert [tokens.label_spans for tokens in read] == [tokens.label_spans for tokens, _ in rows]
