"""Slices of a corpus with context between labels, beside those of plain text, which stay what they were."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes.corpora import build_small_corpus
from fakes.targets import conversations, sequence
from softshard.corpus import reading
from softshard.corpus.manifest import read_corpus_manifest, write_corpus_manifest
from softshard.corpus.read import iter_sequences
from softshard.corpus.slices import decode_slice, encode_slice
from softshard.corpus.verify import find_corpus_orphans, verify_corpus
from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.records.spool import Spool

MASKED = "masked "
"""Documents that begin so get context between their labels."""


@pytest.fixture
def make(tmp_path, tiny_model, texts, monkeypatch):
    """Builds a corpus of 40 documents; `masked` are the numbers of those with context between their labels."""
    windows = reading.document_windows

    def masked_windows(document, **settings):
        for tokens in windows(document, **settings):
            long = document.text.startswith(MASKED) and len(tokens.token_ids) > 14
            yield replace(tokens, label_spans=((7, 9), (10, 13))) if long else tokens

    monkeypatch.setattr(reading, "document_windows", masked_windows)

    def made(folder, *, masked):
        (tmp_path / "rows.jsonl").write_text(
            "".join(
                json.dumps({"text": f"{MASKED if number in masked else ''}{texts[number % 12]} {number}"}) + "\n"
                for number in range(40)
            )
        )
        return build_small_corpus(
            tmp_path / folder, tmp_path / "rows.jsonl", tiny_model, folds=2, sequences_per_part=24
        )

    return made


def test_a_corpus_has_one_version_whichever_document_needs_it(make):
    store, manifest = make("out", masked={37})
    assert manifest.schema_version == 3
    assert manifest.part_version == 2
    frames = [pl.read_parquet(store.local_path(part.path)) for part in manifest.slices]
    assert len({tuple(frame.schema.items()) for frame in frames}) == 1
    assert find_corpus_orphans(store, manifest) == ()
    for part, frame in zip(manifest.slices, frames, strict=True):
        labels = frame["label_runs"].list.gather_every(2, 1).list.sum()
        assert (part.num_labels, part.num_tokens) == (labels.sum(), frame["token_ids"].list.len().sum())
        assert (
            json.loads(pl.read_parquet_metadata(store.local_path(part.path))["softshard-corpus"])["schema_version"] == 3
        )


def test_what_is_read_is_what_the_windows_gave(make):
    plain = {tokens.sequence_id: tokens for tokens in iter_sequences(*make("plain", masked=()), split=None)}
    masked = [
        tokens
        for tokens in iter_sequences(*make("masked", masked={3, 20, 37}), split=None)
        if tokens.sequence_id not in plain or tokens.label_spans != plain[tokens.sequence_id].label_spans
    ]
    assert len({tokens.document_id for tokens in masked}) == 3
    assert {tokens.label_spans for tokens in masked if len(tokens.token_ids) > 14} == {((7, 9), (10, 13))}


def test_corpus_of_plain_text_is_of_version_2(make):
    store, manifest = make("out", masked=())
    assert (manifest.schema_version, manifest.part_version) == (2, 1)
    assert all("first_label" in pl.read_parquet_schema(store.local_path(part.path)) for part in manifest.slices)


def test_slices_of_an_earlier_corpus_are_kept_until_gc(make):
    store, before = make("out", masked=())
    _, after = make("out", masked={39})
    assert after.schema_version == 3
    assert all(store.exists(part.path) for part in (*before.slices, *after.slices))


def test_same_documents_give_the_same_bytes(make):
    one, other = (make(folder, masked={0, 30})[1] for folder in ("one", "other"))
    assert one.slices == other.slices
    assert one.digest == other.digest


def test_corpus_with_context_between_labels_verifies(make):
    store, _ = make("out", masked={1, 2})
    assert verify_corpus(store, deep=True).findings == ()


@pytest.mark.parametrize("runs", [[1, 3], [], [0, 24]])
def test_runs_that_are_not_the_tokens_are_found(make, runs):
    store, manifest = make("out", masked={1, 2})
    part = manifest.slices[0]
    table = pq.read_table(store.local_path(part.path))
    place = table.schema.get_field_index("label_runs")
    values = pa.array([runs, *table["label_runs"].to_pylist()[1:]], table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), values), store.local_path(part.path))
    content = store.read(part.path)
    with pytest.raises(PartCorrupt, match=f"sequence {table['sequence_id'][0]}: its runs of labels do not match"):
        decode_slice(content, uri="slice")
    vouched = part.model_copy(update={"sha256": sha256_hex(content)})
    slices = Spool(type(part), [vouched, *manifest.slices[1:]])
    write_corpus_manifest(store, manifest.model_copy(update={"slices": slices}))
    assert [finding.path for finding in verify_corpus(store, deep=True).findings] == [part.path]


def test_version_2_refuses_labels_that_do_not_run_to_the_end():
    with pytest.raises(ValueError, match=r"sequence a: .* needs schema version 2"):
        encode_slice([sequence("a", range(9), label_spans=((1, 2), (3, 5)))], metadata={})


def test_slice_of_version_3_gives_its_sequences_back():
    given = [tokens for tokens, _ in conversations(np.random.default_rng(0), 8)]
    read = decode_slice(encode_slice(given, metadata={}, version=3), uri="slice")
    assert [tokens.label_spans for tokens in read] == [tokens.label_spans for tokens in given]
    assert [tokens.token_ids.tolist() for tokens in read] == [tokens.token_ids.tolist() for tokens in given]


def test_corpus_of_a_later_version_is_refused(make):
    store, manifest = make("out", masked=())
    write_corpus_manifest(store, manifest.model_copy(update={"schema_version": 4}))
    with pytest.raises(PartCorrupt, match="has schema version 4, this softshard reads 2 and 3"):
        read_corpus_manifest(store)
