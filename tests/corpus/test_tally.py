"""Sources of which much is lost, and what a corpus says of the files and documents that it leaves out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes.events import Listener
from softshard.config import CorpusSettings
from softshard.corpus.build import build_corpus, count_corpus
from softshard.errors import CorpusEmpty, SourceUnreadable, TooMuchLeftOut
from softshard.models import load_tokenizer
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter
from softshard.telemetry.metrics import RunMetrics


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def settings(uri, *, source=None, **changes):
    described = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    values = {"sources": [{**described, **(source or {})}], "holdout_fraction": 0, "context_tokens": 24}
    return CorpusSettings.model_validate({**values, "overlap_tokens": 6, **changes})


def count(tokenizer, uri, reporter=None, **changes):
    chosen = settings(uri, **changes)
    return count_corpus(settings=chosen, tokenizer=tokenizer, folds=0, seed=1, reporter=reporter or SilentReporter())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letters(number, field="text"):
    return [{field: f"Letter {index}."} for index in range(number)]


def test_a_renamed_field_is_refused_and_named_with_its_first_line(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *letters(30), *letters(270, field="body"))
    reporter = Listener()
    with pytest.raises(TooMuchLeftOut) as caught:
        count(tokenizer, path, reporter)
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        f"{path}: source 'letters': 270 of its 300 documents (90.0%) cannot be used: 270 malformed"
        f" (first: file://{path}, line 31: has no field 'text'); check the fields that the source names, or set"
        " `corpus.max_left_out` above 0.05"
    )
    ((name, values),) = reporter.events
    assert (name, values["level"], values["left_out"], values["documents"]) == ("source_read", "warning", 0.9, 300)


def test_files_in_another_encoding_are_refused_and_the_key_named(tmp_path, tokenizer):
    for index in range(40):
        text = f"Caf\u00e9 {index}." if index < 36 else f"Plain {index}."
        (tmp_path / f"{index:02d}.txt").write_text(text, encoding="windows-1252")
    with pytest.raises(TooMuchLeftOut, match=r"36 of its 40 documents \(90.0%\).*set the source's `encoding`"):
        count(tokenizer, tmp_path)
    found = count(tokenizer, tmp_path, source={"encoding": "windows-1252"})
    assert found.counts["kept"] == 40


def test_the_largest_share_is_allowed_and_one_document_more_is_not(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *letters(95), *letters(5, field="body"))
    assert count(tokenizer, path).counts["malformed"] == 5
    write(path, *letters(94), *letters(6, field="body"))
    with pytest.raises(TooMuchLeftOut):
        count(tokenizer, path)
    assert count(tokenizer, path, max_left_out=0.06).counts["malformed"] == 6
    write(path, *letters(99), *letters(1, field="body"))
    with pytest.raises(TooMuchLeftOut):
        count(tokenizer, path, max_left_out=0)


def test_what_is_screened_on_purpose_does_not_count(tmp_path, tokenizer):
    gone = [{"text": text} for text in (*["[deleted]"] * 30, *[" "] * 30, *["x" * 999] * 30, *["twice"] * 30)]
    path = write(tmp_path / "a.jsonl", *letters(5), *gone)
    counts = count(tokenizer, path, source={"drop_texts": ["[deleted]"]}, max_document_bytes=900).counts
    assert counts == {
        "kept": 6,
        "empty": 30,
        "undecodable": 0,
        "oversize": 30,
        "malformed": 0,
        "duplicate": 29,
        "dropped": 30,
    }


def test_each_source_is_counted_on_its_own(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *letters(300))
    write(tmp_path / "b.jsonl", *letters(9), *letters(1, field="body"))
    sources = [
        {"name": name, "uri": str(tmp_path / f"{name}.jsonl"), "style": "s", "license": "MIT", "rights_basis": "owned"}
        for name in "ab"
    ]
    with pytest.raises(TooMuchLeftOut, match="source 'b': 1 of its 10"):
        count(tokenizer, tmp_path, sources=sources)


def test_nothing_is_written_of_a_corpus_that_lost_too_much(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *letters(9), *letters(1, field="body"))
    store = LocalStore(tmp_path / "out")
    with pytest.raises(TooMuchLeftOut):
        build_corpus(
            settings=settings(path), tokenizer=tokenizer, folds=0, seed=1, store=store, reporter=SilentReporter()
        )
    assert not store.exists("manifest.json")


def test_files_that_are_not_read_are_said_logged_and_counted(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *letters(3))
    (tmp_path / "b.csv").write_text("text\n")
    reporter = Listener()
    (entry,) = count(tokenizer, tmp_path, reporter).not_read
    text = f"1 file not read: 1 .csv (first: file://{tmp_path}/b.csv)"
    assert (entry.source, entry.num_files, entry.kinds, entry.text) == ("letters", 1, {".csv": 1}, text)
    assert f"source 'letters': {text}" in reporter.said
    event = {"source": "letters", "files": 1, "kinds": "1 .csv", "level": "warning"}
    assert ("files_not_read", event) in reporter.events


def test_files_that_nobody_expects_to_be_read_are_no_warning(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *letters(3))
    (tmp_path / "_SUCCESS").touch()
    reporter = Listener()
    count(tokenizer, tmp_path, reporter)
    assert [values["level"] for name, values in reporter.events if name == "files_not_read"] == ["info"]


def test_a_source_without_a_document_is_a_warning(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *letters(3))
    (tmp_path / "b.jsonl").touch()
    sources = [
        {"name": name, "uri": str(tmp_path / f"{name}.jsonl"), "style": "s", "license": "MIT", "rights_basis": "owned"}
        for name in "ab"
    ]
    reporter = Listener()
    count(tokenizer, tmp_path, reporter, sources=sources)
    levels = {values["source"]: values["level"] for name, values in reporter.events if name == "source_read"}
    assert levels == {"a": "info", "b": "warning"}
    assert f"source 'b': 1 file not read: 1 empty (first: file://{tmp_path}/b.jsonl)" in reporter.said


def test_metrics_have_the_share_of_every_source():
    metrics = RunMetrics()
    metrics.take("run_started", {"job": "night", "run": "1"})
    metrics.take("source_read", {"source": "a", "documents": 300, "left_out": 0.9})
    found = {
        (sample.name, sample.labels.get("source")): sample.value
        for item in metrics.collect()
        for sample in item.samples
    }
    assert found["softshard_source_documents", "a"] == 300
    assert found["softshard_source_left_out_ratio", "a"] == 0.9


@pytest.mark.parametrize(
    ("content", "fields", "problem"),
    [
        ('{"text": "x", "author": ["Ada"]}\n', {"group_field": "author"}, r"'author', the `group_field`, holds a list"),
        (
            '{"text": "x", "author": {"a": 1}}\n',
            {"group_field": "author"},
            r"`group_field`, holds an object and no name; name another",
        ),
        ('{"text": "x"}\n', {"group_field": "author"}, r"line 1: has no field 'author', the `group_field`"),
        (
            '{"chat": [{"role": "user"}]}\n',
            {"text_field": "chat"},
            r"field 'chat' holds a list of objects, not text; join the messages",
        ),
        (
            '[{"text": "x"}]\n',
            {},
            r"line 1: is a list of objects, and every line has to be one object; an array is converted, in",
        ),
        ('[\n  {"text": "x"}\n]\n', {}, r"is a JSON array, and JSON Lines has one object per line; convert it, in Pyt"),
        ('[{"text": "x"},\n {"text": "y"}]\n', {}, r"is a JSON array"),
        ('{\n  "text": "x"\n}\n', {}, r"is one JSON object over several lines"),
        ("text\n", {}, r"line 1: is not JSON, of which every line has to be one object"),
    ],
)
def test_rows_that_are_not_what_was_asked_for_name_themselves(tmp_path, tokenizer, content, fields, problem):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SourceUnreadable, match=problem):
        count(tokenizer, tmp_path / "a.jsonl", source=fields)


def test_parquet_column_that_cannot_name_a_group_is_refused_by_name(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": ["x"], "author": [["Ada"]]}), tmp_path / "a.parquet")
    with pytest.raises(SourceUnreadable, match=r"column 'author' holds list<.*>, which cannot name a group; change"):
        count(tokenizer, tmp_path / "a.parquet", source={"group_field": "author"})


def test_a_single_document_is_told_how_to_be_several(tmp_path, tokenizer):
    (tmp_path / "diary.txt").write_text("\n\n".join(f"Day {day}. It rained." for day in range(40)))
    with pytest.raises(CorpusEmpty, match=r"split of the corpus .*\(1 kept.*set `split_texts` of the source"):
        count(tokenizer, tmp_path, holdout_fraction=0.2)
    found = count(tokenizer, tmp_path, source={"split_texts": "blank_lines"}, holdout_fraction=0.2)
    assert found.counts["kept"] == 40


def test_keys_of_a_source_that_came_later_leave_earlier_corpora_as_they_are(tmp_path, tokenizer):
    """The key is worked out here from the settings that there were before."""
    from softshard.corpus.build import corpus_key
    from softshard.corpus.manifest import CORPUS_VERSION
    from softshard.records.digest import canonical_digest
    from softshard.sources.read import list_source

    path = write(tmp_path / "a.jsonl", *letters(3))
    chosen = settings(path)
    (source,) = chosen.sources
    read = {"name": "letters", "uri": str(path), "format": "auto", "style": "plain", "license": "CC0-1.0"}
    read |= {"rights_basis": "owned", "text_field": "text", "group_field": None, "split": "train"}
    read |= {"max_documents": None}
    then = {"sources": [read], "holdout_fraction": 0.0, "context_tokens": 24, "overlap_tokens": 6}
    then |= {"normalisation": "NFC", "max_document_bytes": 2**26, "sequences_per_part": 256, "duplicates": "spacing"}
    files = [["letters", [[ascii(file.uri), file.version] for file in list_source(source)]]]
    parts = [CORPUS_VERSION, then, tokenizer.fingerprint, tokenizer.vocab_size, 0, 1, files]
    assert corpus_key(chosen, tokenizer=tokenizer, folds=0, seed=1) == canonical_digest(parts)
    assert corpus_key(settings(path, max_left_out=1), tokenizer=tokenizer, folds=0, seed=1) == canonical_digest(parts)
    other = settings(path, source={"split_texts": "lines"})
    assert corpus_key(other, tokenizer=tokenizer, folds=0, seed=1) != canonical_digest(parts)
