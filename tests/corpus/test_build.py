import json
import os

import polars as pl
import pytest

from fakes.events import Listener
from softshard.config import CorpusSettings
from softshard.corpus.build import build_corpus, corpus_key, count_corpus, current_corpus, first_sequences
from softshard.corpus.manifest import read_corpus_manifest
from softshard.corpus.screen import assign_fold, assign_split
from softshard.errors import CorpusEmpty, FoldEmpty, PartCorrupt, SourceUnreadable
from softshard.models import load_tokenizer
from softshard.records.digest import sha256_hex
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter

PER_SLICE = 5
CONTEXT, OVERLAP = 24, 6


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def letters(tmp_path, texts):
    folder = tmp_path / "letters"
    folder.mkdir()
    rows = [{"text": f"{text} {i}", "author": f"author {i % 3}"} for i, text in enumerate(texts * 4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "essay.md").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def settings(uri, **changes):
    source = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    values = {
        "sources": [source],
        "holdout_fraction": 0.25,
        "context_tokens": CONTEXT,
        "overlap_tokens": OVERLAP,
        "sequences_per_part": PER_SLICE,
    }
    return CorpusSettings.model_validate({**values, **changes})


def build(uri, out, tokenizer, *, folds=2, seed=1, reporter=None, **changes):
    return build_corpus(
        settings=settings(uri, **changes),
        tokenizer=tokenizer,
        folds=folds,
        seed=seed,
        store=LocalStore(out),
        reporter=reporter or SilentReporter(),
    )


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(folder):
    return {name: content for name, (content, _, _) in tree(folder).items()}


def test_every_sequence_is_written_once_in_a_slice_of_its_split_and_fold(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer)
    frames = {part.path: pl.read_parquet(tmp_path / "out" / part.path) for part in manifest.slices}
    for part in manifest.slices:
        frame = frames[part.path]
        lengths = frame["token_ids"].list.len()
        assert sha256_hex((tmp_path / "out" / part.path).read_bytes()) == part.sha256
        assert part.path.endswith(f"-{part.sha256[:16]}.parquet")
        assert frame.columns == [
            *("sequence_id", "document_id", "source", "style", "group", "start", "first_label", "token_ids"),
        ]
        assert len(frame) == part.num_sequences <= PER_SLICE
        assert int(lengths.sum()) == part.num_tokens
        assert int((lengths - frame["first_label"]).sum()) == part.num_labels
        for document_id in frame["document_id"]:
            assert assign_split(document_id, seed=1, holdout_fraction=0.25) == part.split
            expected = assign_fold(document_id, seed=1, folds=2) if part.split == "train" else -1
            assert expected == part.fold
    everything = pl.concat(list(frames.values()))
    assert everything["sequence_id"].n_unique() == len(everything)
    assert {part.split for part in manifest.slices} == {"train", "test"}
    assert {part.fold for part in manifest.of_split("train")} == {0, 1}


def test_slices_give_the_text_back(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer)
    frame = pl.concat([pl.read_parquet(tmp_path / "out" / part.path) for part in manifest.slices])
    written = {}
    for row in frame.sort("document_id", "start").iter_rows(named=True):
        ids = row["token_ids"] if row["start"] == 0 else row["token_ids"][row["first_label"] :]
        written.setdefault(row["document_id"], []).extend(ids)
    rows = [json.loads(line)["text"] for line in (letters / "rows.jsonl").read_text().splitlines()]
    expected = {*rows, (letters / "essay.md").read_text()}
    assert all(ids.pop() == tokenizer.eos_id for ids in written.values())
    assert {tokenizer.decode(ids) for ids in written.values()} == expected


def test_slices_keep_the_order_in_which_the_documents_came(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer)
    order = pl.concat([pl.read_parquet(tmp_path / "out" / file.path) for file in manifest.documents])
    for split, fold in (("train", 0), ("train", 1), ("test", -1)):
        parts = [part for part in manifest.slices if (part.split, part.fold) == (split, fold)]
        found = pl.concat([pl.read_parquet(tmp_path / "out" / part.path) for part in parts])
        came = order.filter((pl.col("split") == split) & (pl.col("fold") == fold))["document_id"]
        assert found["document_id"].unique(maintain_order=True).to_list() == came.to_list()
        assert len(parts) > 2
        assert all(PER_SLICE / 2 <= part.num_sequences <= PER_SLICE for part in parts[:-1])
        assert 1 <= parts[-1].num_sequences <= PER_SLICE


def test_documents_file_has_a_row_a_document_with_its_sizes(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer, sources=[source_of(letters, group_field="author")])
    (file,) = manifest.documents
    frame = pl.read_parquet(tmp_path / "out" / file.path)
    assert sha256_hex((tmp_path / "out" / file.path).read_bytes()) == file.sha256
    assert len(frame) == file.num_documents == 49
    row = frame.filter(pl.col("name").str.ends_with("rows.jsonl, line 2")).row(0, named=True)
    text = json.loads((letters / "rows.jsonl").read_text().splitlines()[1])["text"]
    (ids,) = tokenizer.encode([text])
    assert row["group"] == "author 1"
    assert row["bytes"] == len(text.encode())
    assert row["tokens"] == len(ids) + 1
    assert row["labels"] == len(ids)
    assert int(frame["bytes"].sum()) == sum(part.num_bytes_text for part in manifest.slices)
    assert int(frame["labels"].sum()) == sum(part.num_labels for part in manifest.slices)
    assert int(frame["sequences"].sum()) == sum(part.num_sequences for part in manifest.slices)


def source_of(uri, **changes):
    return settings(uri).sources[0].model_dump() | changes


def test_statistics_are_those_of_the_documents(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer)
    frame = pl.read_parquet(tmp_path / "out" / manifest.documents[0].path)
    assert [(row.style, row.source, row.split) for row in manifest.statistics] == [
        ("plain", "letters", "test"),
        ("plain", "letters", "train"),
    ]
    for row in manifest.statistics:
        tokens = sorted(frame.filter(pl.col("split") == row.split)["tokens"].to_list())
        middle = (tokens[(len(tokens) - 1) // 2] + tokens[len(tokens) // 2]) / 2
        assert (row.num_documents, row.num_tokens, row.max_tokens) == (len(tokens), sum(tokens), tokens[-1])
        assert row.mean_tokens == pytest.approx(sum(tokens) / len(tokens), rel=1e-12)
        assert row.median_tokens == middle
        assert row.num_labels == sum(tokens) - len(tokens)
        assert row.num_sequences == sum(part.num_sequences for part in manifest.of_split(row.split))


def test_documents_span_several_files_when_there_are_many(tmp_path, letters, tokenizer, monkeypatch):
    monkeypatch.setattr("softshard.corpus.documents._ROWS_PER_FILE", 20)
    manifest = build(letters, tmp_path / "out", tokenizer)
    assert [file.num_documents for file in manifest.documents] == [20, 20, 9]
    assert sum(row.num_documents for row in manifest.statistics) == 49


def test_same_input_gives_the_same_bytes_in_another_folder(tmp_path, letters, tokenizer):
    build(letters, tmp_path / "one", tokenizer)
    build(letters, tmp_path / "two", tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_complete_corpus_is_given_back_without_reading_or_writing(tmp_path, letters, tokenizer, monkeypatch):
    first = build(letters, tmp_path / "out", tokenizer)
    before = tree(tmp_path / "out")

    def unread(*_, **__):
        raise AssertionError("text was read")

    monkeypatch.setattr("softshard.corpus.reading.read_documents", unread)
    assert build(letters, tmp_path / "out", tokenizer) == first
    assert tree(tmp_path / "out") == before


def test_changed_file_is_recomputed(tmp_path, letters, tokenizer):
    first = build(letters, tmp_path / "out", tokenizer)
    with (letters / "rows.jsonl").open("a") as file:
        file.write('{"text": "A new line at the end of the file."}\n')
    second = build(letters, tmp_path / "out", tokenizer)
    assert second.counts["kept"] == first.counts["kept"] + 1
    assert second.digest != first.digest
    assert read_corpus_manifest(LocalStore(tmp_path / "out")) == second


def test_touched_or_moved_input_is_read_again_and_leaves_digest_and_slices_as_they_were(tmp_path, letters, tokenizer):
    first = build(letters, tmp_path / "out", tokenizer)
    slices = {part.path: tree(tmp_path / "out")[part.path] for part in first.slices}
    os.utime(letters / "rows.jsonl", (1, 1))
    touched = build(letters, tmp_path / "out", tokenizer)
    letters.rename(tmp_path / "moved")
    moved = build(tmp_path / "moved", tmp_path / "out", tokenizer)
    assert len({first.key, touched.key, moved.key}) == 3
    assert first.digest == touched.digest == moved.digest
    assert {part.path: tree(tmp_path / "out")[part.path] for part in moved.slices} == slices


def test_lost_slice_is_written_again(tmp_path, letters, tokenizer):
    first = build(letters, tmp_path / "out", tokenizer)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / first.slices[1].path).unlink()
    assert build(letters, tmp_path / "out", tokenizer) == first
    assert contents(tmp_path / "out") == before


def test_stopped_build_leaves_no_manifest_and_the_next_gives_the_same_bytes(tmp_path, letters, tokenizer, monkeypatch):
    build(letters, tmp_path / "whole", tokenizer)
    put, written = LocalStore.put_once, []

    def die(self, path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        put(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put_once", die)
        with pytest.raises(KeyboardInterrupt):
            build(letters, tmp_path / "out", tokenizer)
    assert len(written) == 2
    assert read_corpus_manifest(LocalStore(tmp_path / "out")) is None
    build(letters, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"folds": 3}, {"context_tokens": 32}, {"overlap_tokens": 7}, {"normalisation": "NFKC"}]
)
def test_anything_that_changes_the_corpus_changes_its_key(letters, tokenizer, change):
    base = {"folds": 2, "seed": 1}
    changed = {name: change.get(name, value) for name, value in base.items()}
    other = settings(letters, **{name: value for name, value in change.items() if name not in base})
    first = corpus_key(settings(letters), tokenizer=tokenizer, **base)
    assert corpus_key(other, tokenizer=tokenizer, **changed) != first


def test_renamed_file_changes_the_key_and_reading_alone_does_not(letters, tokenizer):
    asked = {"tokenizer": tokenizer, "folds": 2, "seed": 1}
    first = corpus_key(settings(letters), **asked)
    assert corpus_key(settings(letters), **asked) == first
    (letters / "essay.md").rename(letters / "story.md")
    assert corpus_key(settings(letters), **asked) != first


def test_count_is_what_the_build_writes_and_writes_nothing(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer)
    count = count_corpus(settings=settings(letters), tokenizer=tokenizer, folds=2, seed=1, reporter=SilentReporter())
    assert count.counts == manifest.counts
    assert [(part.split, part.fold) for part in count.splits] == [("train", 0), ("train", 1), ("test", -1)]
    for part in count.splits:
        slices = [s for s in manifest.slices if (s.split, s.fold) == (part.split, part.fold)]
        assert part.num_slices == len(slices)
        for name in ("num_documents", "num_bytes_text", "num_tokens", "num_labels", "num_sequences"):
            assert getattr(part, name) == sum(getattr(s, name) for s in slices), name
    assert count.total()["num_documents"] == 49
    assert count.total("train")["num_slices"] + count.total("test")["num_slices"] == len(manifest.slices)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "out"]


def test_first_sequences_are_those_the_corpus_begins_with(letters, tokenizer):
    found = first_sequences(settings=settings(letters), tokenizer=tokenizer, seed=1, num_tokens=CONTEXT + 1)
    (ids,) = tokenizer.encode([(letters / "essay.md").read_text()])
    assert [sequence.token_ids.tolist() for sequence in found] == [
        ids[:CONTEXT],
        ids[CONTEXT - OVERLAP : 2 * CONTEXT - OVERLAP],
    ]


def test_current_corpus_is_none_until_it_is_complete(tmp_path, letters, tokenizer):
    asked = {"settings": settings(letters), "tokenizer": tokenizer, "folds": 2, "seed": 1}
    store = LocalStore(tmp_path / "out")
    assert current_corpus(**asked, store=store) is None
    manifest = build(letters, tmp_path / "out", tokenizer)
    assert current_corpus(**asked, store=store) == manifest
    assert current_corpus(**{**asked, "seed": 2}, store=store) is None


def test_what_is_left_out_is_counted_in_the_manifest_and_said_on_one_line(tmp_path, letters, tokenizer):
    (letters / "bad.txt").write_bytes(b"caf\xe9")
    (letters / "twin.md").write_bytes((letters / "essay.md").read_bytes())
    (letters / "empty.txt").write_text(" \n")
    reporter = Listener()
    manifest = build(letters, tmp_path / "out", tokenizer, reporter=reporter)
    assert manifest.counts == {
        "kept": 49,
        "empty": 1,
        "undecodable": 1,
        "oversize": 0,
        "malformed": 0,
        "duplicate": 1,
    }
    (line,) = reporter.said
    assert "49 of 52 documents kept" in line
    for shown in ("bad.txt", "twin.md", "empty.txt"):
        assert shown in line
    assert "oversize" not in line


def test_equal_text_in_two_sources_is_the_first_ones(tmp_path, tokenizer):
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl").write_text(rows + '{"text": "only here"}\n')
    sources = [source_of(tmp_path / "a.jsonl", name="a"), source_of(tmp_path / "b.jsonl", name="b", style="ornate")]
    manifest = build(tmp_path, tmp_path / "out", tokenizer, sources=sources)
    assert manifest.counts["duplicate"] == 40
    assert {(row.source, row.num_documents) for row in manifest.statistics if row.source == "b"} == {("b", 1)}
    assert [(rights.name, rights.style) for rights in manifest.sources] == [("a", "plain"), ("b", "ornate")]


def test_file_whose_name_is_not_utf8_is_read(tmp_path, letters, tokenizer):
    (letters / os.fsdecode(b"caf\xe9.txt")).write_text("A text under an odd name.")
    manifest = build(letters, tmp_path / "out", tokenizer)
    assert manifest.counts["kept"] == 50
    names = pl.read_parquet(tmp_path / "out" / manifest.documents[0].path)["name"]
    assert names.str.ends_with("caf\\udce9.txt").sum() == 1


def test_document_longer_than_allowed_is_left_out_and_the_rest_built(tmp_path, letters, tokenizer):
    (letters / "long.txt").write_text("word " * 2000)
    manifest = build(letters, tmp_path / "out", tokenizer, max_document_bytes=5000)
    assert (manifest.counts["oversize"], manifest.counts["kept"]) == (1, 49)


def test_document_of_one_token_is_one_sequence_with_one_label(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a")
    manifest = build(tmp_path / "a.txt", tmp_path / "out", tokenizer, folds=0, holdout_fraction=0)
    (part,) = manifest.slices
    row = pl.read_parquet(tmp_path / "out" / part.path).row(0, named=True)
    assert row["token_ids"] == [*tokenizer.encode(["a"])[0], tokenizer.eos_id]
    assert (part.num_sequences, part.num_labels, part.num_bytes_text, row["first_label"]) == (1, 1, 1, 1)
    assert part.path.startswith("sequences/train-all-")


def test_text_that_the_tokenizer_does_not_see_counts_as_empty(tmp_path, tokenizer):
    class Blind:
        fingerprint, vocab_size, bos_id, eos_id = tokenizer.fingerprint, tokenizer.vocab_size, None, tokenizer.eos_id

        def encode(self, texts):
            return [[] if text == "unseen" else ids for text, ids in zip(texts, tokenizer.encode(texts), strict=True)]

    (tmp_path / "rows.jsonl").write_text('{"text": "seen"}\n{"text": "unseen"}\n')
    manifest = build(tmp_path / "rows.jsonl", tmp_path / "out", Blind(), folds=0, holdout_fraction=0)
    assert (manifest.counts["kept"], manifest.counts["empty"]) == (1, 1)
    assert sum(part.num_documents for part in manifest.slices) == 1


def test_corpus_with_nothing_left_is_refused_with_its_counts(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("  ")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    problem = r"the corpus has no document.*1 empty, 1 undecodable"
    with pytest.raises(CorpusEmpty, match=problem) as caught:
        build(tmp_path, tmp_path / "out", tokenizer, max_left_out=1)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    chosen = settings(tmp_path, max_left_out=1)
    with pytest.raises(CorpusEmpty, match=problem):
        count_corpus(settings=chosen, tokenizer=tokenizer, folds=2, seed=1, reporter=SilentReporter())


@pytest.mark.parametrize(("fraction", "missing"), [(1e-9, "test"), (1 - 1e-9, "train")])
def test_empty_split_is_refused_by_name(tmp_path, letters, tokenizer, fraction, missing):
    with pytest.raises(CorpusEmpty, match=f"the {missing} split"):
        build(letters, tmp_path / "out", tokenizer, holdout_fraction=fraction)


def test_corpus_that_is_too_small_for_its_holdout_names_a_fraction_that_is_enough(tmp_path, letters, tokenizer):
    with pytest.raises(
        CorpusEmpty, match=r"set `corpus.holdout_fraction` to 0\.\d+ or more, which holds out one"
    ) as raised:
        build(letters, tmp_path / "out", tokenizer, holdout_fraction=1e-6)
    enough = raised.value.enough
    manifest = build(letters, tmp_path / "out", tokenizer, holdout_fraction=enough)
    assert {part.split for part in manifest.statistics} == {"train", "test"}
    with pytest.raises(CorpusEmpty):
        build(letters, tmp_path / "less", tokenizer, holdout_fraction=enough - 0.01)


def test_corpus_without_a_holdout_needs_no_test_split(tmp_path, letters, tokenizer):
    manifest = build(letters, tmp_path / "out", tokenizer, holdout_fraction=0)
    assert {part.split for part in manifest.slices} == {"train"}


def test_fold_with_nothing_to_train_on_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One text alone.")
    with pytest.raises(FoldEmpty, match=r"of 2 would have no document"):
        build(tmp_path, tmp_path / "out", tokenizer, holdout_fraction=0)


def test_source_that_is_gone_is_refused(tmp_path, tokenizer):
    with pytest.raises(SourceUnreadable, match="nowhere"):
        build(tmp_path / "nowhere", tmp_path / "out", tokenizer)


def test_unreadable_manifest_is_refused_by_name(tmp_path, letters, tokenizer):
    build(letters, tmp_path / "out", tokenizer)
    file = tmp_path / "out" / "manifest.json"
    whole = json.loads(file.read_text())
    for damaged in ("{", "[]", json.dumps({**whole, "slices": 3}), json.dumps({**whole, "schema_version": 99})):
        file.write_text(damaged)
        with pytest.raises(PartCorrupt, match=r"manifest\.json"):
            build(letters, tmp_path / "out", tokenizer)


def test_source_whose_field_is_misspelled_is_refused_and_not_passed_over(tmp_path, letters, tokenizer):
    source = {"name": "l", "uri": str(letters / "rows.jsonl"), "style": "plain", "license": "MIT"}
    chosen = settings(letters, sources=[{**source, "rights_basis": "owned", "text_field": "txet"}])
    with pytest.raises(SourceUnreadable, match=r"none of its 48 documents has text in the field 'txet'; check"):
        count_corpus(settings=chosen, tokenizer=tokenizer, folds=0, seed=1, reporter=SilentReporter())


def test_text_that_two_sources_spell_with_other_white_space_is_in_one_split_and_one_fold(tmp_path, tokenizer):
    """200 texts as JSON Lines, and again as files that end with a newline."""
    stories = [f"On day {i} the boat came in. It had nothing in it.\n\nDay {i} ended." for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    (tmp_path / "files").mkdir()
    for i, text in enumerate(stories):
        (tmp_path / f"files/{i:03}.txt").write_text(f"{text}\n")
    about = {"style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    sources = [{"name": name, "uri": str(tmp_path / name), **about} for name in ("rows.jsonl", "files")]
    manifest = build(tmp_path, tmp_path / "out", tokenizer, sources=sources)
    assert (manifest.counts["kept"], manifest.counts["duplicate"]) == (200, 200)
    documents = pl.concat([pl.read_parquet(tmp_path / "out" / file.path) for file in manifest.documents])
    assert documents["source"].unique().to_list() == ["rows.jsonl"]
    assert len(documents) == 200
