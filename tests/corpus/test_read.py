import json

import polars as pl
import pytest

from fakes.corpora import build_small_corpus
from softshard.corpus.read import iter_sequences, read_slice
from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex

FIELDS = ("sequence_id", "document_id", "source", "style", "group", "start")


@pytest.fixture
def corpus(tmp_path, tiny_model, texts):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(4) for text in texts)
    )
    return build_small_corpus(tmp_path / "out", tmp_path / "rows.jsonl", tiny_model, folds=3, sequences_per_part=70)


def test_slice_is_read_as_polars_reads_it(corpus):
    store, manifest = corpus
    for part in manifest.slices:
        rows = pl.read_parquet(store.local_path(part.path)).rows(named=True)
        sequences = read_slice(store, part)
        assert [{name: getattr(s, name) for name in FIELDS} for s in sequences] == [
            {name: row[name] for name in FIELDS} for row in rows
        ]
        assert [s.label_spans for s in sequences] == [((row["first_label"], len(row["token_ids"])),) for row in rows]
        assert [s.token_ids.tolist() for s in sequences] == [row["token_ids"] for row in rows]
        assert {s.token_ids.dtype.name for s in sequences} == {"int32"}


def test_sequences_of_a_split_leave_out_the_folds_that_are_excluded(corpus):
    store, manifest = corpus
    of_fold = {
        fold: [s.sequence_id for part in manifest.slices if part.fold == fold for s in read_slice(store, part)]
        for fold in (0, 1, 2, -1)
    }

    def ids(**choice):
        return [sequence.sequence_id for sequence in iter_sequences(store, manifest, **choice)]

    assert all(of_fold.values())
    assert ids(split="test") == of_fold[-1]
    assert ids(split="train") == of_fold[0] + of_fold[1] + of_fold[2]
    assert ids(split="train", folds_excluded=(1,)) == of_fold[0] + of_fold[2]
    assert ids(split=None) == of_fold[0] + of_fold[1] + of_fold[2] + of_fold[-1]


def test_slice_that_was_changed_or_is_gone_is_refused_by_name(corpus):
    store, manifest = corpus
    part = manifest.slices[0]
    file = store.local_path(part.path)
    content = file.read_bytes()
    name = part.path.rsplit("/", 1)[-1]
    another = store.read(manifest.slices[1].path)
    for damaged in (content[:-10], content[:500] + b"x" + content[501:], b"", another):
        file.write_bytes(damaged)
        with pytest.raises(PartCorrupt, match=name):
            read_slice(store, part)
    file.unlink()
    with pytest.raises(PartCorrupt, match=f"{name}.*missing"):
        read_slice(store, part)


@pytest.mark.parametrize("kind", ["other columns", "not Parquet"])
def test_file_that_is_no_slice_is_refused(corpus, tmp_path, kind):
    store, manifest = corpus
    file = tmp_path / "out" / "other.parquet"
    if kind == "other columns":
        pl.DataFrame({"text": ["one"]}).write_parquet(file)
    else:
        file.write_text("text")
    part = manifest.slices[0].model_copy(update={"path": "other.parquet", "sha256": sha256_hex(file.read_bytes())})
    with pytest.raises(PartCorrupt, match=r"other\.parquet"):
        read_slice(store, part)


def test_slice_says_which_tokenizer_and_windows_made_it(corpus):
    store, manifest = corpus
    part = manifest.of_split("test")[0]
    metadata = json.loads(pl.read_parquet_metadata(store.local_path(part.path))["softshard-corpus"])
    assert metadata == {
        "schema_version": 2,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "vocab_size": manifest.vocab_size,
        "context_tokens": 24,
        "overlap_tokens": 6,
        "split": "test",
        "fold": -1,
    }
