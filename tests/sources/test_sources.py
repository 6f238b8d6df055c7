import datetime
import decimal
import gzip
import json
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from softshard.config import SourceSettings
from softshard.errors import SourceUnavailable, SourceUnreadable, StorageFull
from softshard.sources.read import list_source, read_documents

LIMIT = 2**20


def source(uri, **changes):
    values = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return SourceSettings.model_validate({**values, **changes})


def read(uri, *, limit=LIMIT, **changes):
    return list(read_documents(source(uri, **changes), max_document_bytes=limit))


def texts(documents):
    return [document.text for document in documents]


def problems(documents):
    return [document.problem for document in documents]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


ROWS = [{"text": "Grün ist\nder Weg.", "author": "Ada"}, {"text": "A second one.", "author": "Bo"}]
CONTENTS = {
    "text": ("notes.txt", "Grün ist\nder Weg.".encode(), ["Grün ist\nder Weg."]),
    "markdown": ("notes.md", b"# Head\n\nBody.\n", ["# Head\n\nBody.\n"]),
    "jsonl": ("notes.jsonl", as_jsonl(ROWS), [row["text"] for row in ROWS]),
    "parquet": ("notes.parquet", as_parquet(pa.Table.from_pylist(ROWS)), [row["text"] for row in ROWS]),
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_format_is_read_plain_and_compressed(tmp_path, kind, ending):
    name, content, expected = CONTENTS[kind]
    file = tmp_path / (name + ending)
    file.write_bytes(COMPRESSIONS[ending](content))
    documents = read(file)
    assert texts(documents) == expected
    assert problems(documents) == [None] * len(expected)
    assert {document.group for document in documents} == {"letters"}


@pytest.mark.parametrize("within", ["in/a.jsonl", "in", "in/*.jsonl*"])
def test_files_of_an_archive_are_read_by_their_own_endings(tmp_path, within):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.jsonl", as_jsonl(ROWS[:1]))
        archive.writestr("in/b.jsonl.gz", gzip.compress(as_jsonl(ROWS[1:])))
        archive.writestr("other/c.jsonl", as_jsonl(ROWS))
    expected = [row["text"] for row in (ROWS[:1] if within.endswith("a.jsonl") else ROWS)]
    documents = read(f"zip://{within}::{tmp_path}/all.zip")
    assert texts(documents) == expected
    assert documents[0].name == f"zip://in/a.jsonl::{tmp_path}/all.zip, line 1"


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_group_field_names_the_group_and_null_stands_for_the_source(tmp_path, name):
    rows = [{"body": "one", "author": "Ada"}, {"body": "two", "author": None}]
    file = tmp_path / f"rows.{name}"
    file.write_bytes(as_jsonl(rows) if name == "jsonl" else as_parquet(pa.Table.from_pylist(rows)))
    documents = read(file, text_field="body", group_field="author")
    assert [(document.text, document.group) for document in documents] == [("one", "Ada"), ("two", "letters")]


def test_number_as_group_is_written_out_and_a_list_is_malformed(tmp_path):
    rows = [{"text": "one", "year": 1851}, {"text": "two", "year": [1851]}]
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl(rows))
    documents = read(tmp_path, group_field="year")
    assert [document.group for document in documents] == ["1851", "letters"]
    assert problems(documents) == [None, "malformed"]


@pytest.mark.parametrize(
    ("value", "group"),
    [
        (datetime.date(1851, 2, 3), "1851-02-03"),
        (datetime.datetime(1851, 2, 3, 4), "1851-02-03 04:00:00"),
        (decimal.Decimal("1.50"), "1.50"),
        (True, "True"),
    ],
)
def test_a_date_or_number_of_a_parquet_column_is_written_out_as_group(tmp_path, value, group):
    pq.write_table(pa.table({"text": ["one"], "when": [value]}), tmp_path / "rows.parquet")
    assert [document.group for document in read(tmp_path, group_field="when")] == [group]


def test_auto_takes_the_known_files_of_a_folder_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.TXT").write_text("second")
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": "first"}]))
    (tmp_path / "sub" / "c.md.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("never")
    assert texts(read(tmp_path)) == ["first", "second", "third"]
    assert [file.uri.rsplit("/", 1)[-1] for file in list_source(source(tmp_path))] == ["a.jsonl", "b.TXT", "c.md.gz"]


@pytest.mark.parametrize("single", [True, False])
def test_unknown_endings_alone_are_refused_with_the_known_ones_named(tmp_path, single):
    (tmp_path / "notes.doc").write_text("text")
    with pytest.raises(SourceUnreadable, match=r"\.jsonl.*\.parquet.*\.zst"):
        read(tmp_path / "notes.doc" if single else tmp_path)


def test_format_in_the_settings_overrules_the_ending(tmp_path):
    (tmp_path / "notes.log").write_text("a line\n")
    assert texts(read(tmp_path / "notes.log", format="text")) == ["a line\n"]


def test_uri_that_is_not_complete_is_refused_by_name():
    with pytest.raises(SourceUnreadable, match=r"github://x: .* the URI is not complete"):
        read("github://x")


def test_missing_source_is_refused_by_name(tmp_path):
    with pytest.raises(SourceUnreadable, match=r"nowhere.*no such file"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("field", ["license", "rights_basis", "style"])
def test_source_without_rights_is_refused(tmp_path, field):
    values = source(tmp_path).model_dump()
    del values[field]
    with pytest.raises(ValidationError, match=field):
        SourceSettings.model_validate(values)


def test_text_that_is_not_utf8_is_a_problem_of_its_own_file_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("fine")
    documents = read(tmp_path)
    assert problems(documents) == ["undecodable", None]
    assert texts(documents) == [None, "fine"]
    assert documents[0].name.endswith("a.txt")


def test_bad_json_lines_are_named_and_the_others_read(tmp_path):
    lines = [
        b'{"text": "one"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "half a pair: \\ud800"}',
        b'{"text": "cut',
        b'["text"]',
        b'"text"',
        b'{"body": "other"}',
        b'{"text": 5}',
        b'{"text": null}',
        b"[" * 200_000,
        b"",
        b'  {"text": "two"}\r',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    documents = read(file)
    assert problems(documents) == [None, "undecodable", "undecodable", *["malformed"] * 7, None]
    assert [document.text for document in documents if document.problem is None] == ["one", "two"]
    assert documents[1].name.endswith("rows.jsonl, line 2")
    assert documents[-1].name.endswith("rows.jsonl, line 12")


def test_json_line_without_the_group_field_is_malformed(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(as_jsonl([{"text": "one"}, {"text": "two", "author": "Ada"}]))
    documents = read(tmp_path, group_field="author")
    assert problems(documents) == ["malformed", None]


def test_group_that_is_not_unicode_is_a_problem_of_its_line_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "one", "author": "\\udfff"}\n{"text": "two", "author": "Bo"}\n')
    assert problems(read(tmp_path, group_field="author")) == ["undecodable", None]


def test_parquet_value_that_is_not_utf8_is_a_problem_of_its_own_row_alone(tmp_path):
    bad = pa.StringArray.from_buffers(3, pa.array([0, 3, 4, 7], pa.int32()).buffers()[1], pa.py_buffer(b"one\xfftwo"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "rows.parquet")
    documents = read(tmp_path)
    assert texts(documents) == ["one", None, "two"]
    assert problems(documents) == [None, "undecodable", None]
    assert documents[1].name.endswith("rows.parquet, row 2")


def test_parquet_null_is_malformed_and_rows_are_counted_across_row_groups(tmp_path):
    values = [f"text {i}" for i in range(100)]
    values[70] = None
    pq.write_table(pa.table({"text": values, "other": range(100)}), tmp_path / "rows.parquet", row_group_size=30)
    documents = read(tmp_path)
    assert texts(documents) == values
    assert [d.name.rsplit(" ", 1)[-1] for d in documents if d.problem == "malformed"] == ["71"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_may_be_of_any_string_type(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array(["one", "zwölf", "one"]).cast(kind)}), tmp_path / "rows.parquet")
    assert texts(read(tmp_path)) == ["one", "zwölf", "one"]


def test_missing_column_is_refused_with_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"body": ["one"], "author": ["Ada"]}), tmp_path / "rows.parquet")
    with pytest.raises(SourceUnreadable, match=r"rows\.parquet.*no column 'text'.*body, author"):
        read(tmp_path)
    with pytest.raises(SourceUnreadable, match=r"no column 'writer'"):
        read(tmp_path, text_field="body", group_field="writer")


def test_column_of_numbers_is_refused_as_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "rows.parquet")
    with pytest.raises(SourceUnreadable, match="'text' holds int64"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["cut.txt.gz", "cut.txt.zst", "rows.parquet", "noise.jsonl.zst", "noise.txt.gz", "rows.parquet.zst"]
)
def test_damaged_file_is_refused_by_name(tmp_path, name):
    pack = COMPRESSIONS[Path(name).suffix] if name.startswith("cut") else bytes
    whole = pack(random.Random(0).randbytes(2**20))
    (tmp_path / name).write_bytes(whole[:-20] if name.startswith("cut") else b"PAR1 is not enough")
    with pytest.raises(SourceUnreadable, match=name):
        read(tmp_path, limit=2**30)


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n{"text": "\\ufeffescaped"}\n')
    assert texts(read(tmp_path)) == ["text", "line", "escaped"]


def test_max_documents_takes_the_first_ones(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": str(i)} for i in range(5)]))
    (tmp_path / "b.jsonl").write_bytes(as_jsonl([{"text": str(i)} for i in range(5, 9)]))
    assert texts(read(tmp_path, max_documents=7)) == [str(i) for i in range(7)]


def test_document_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    (tmp_path / "b.txt").write_bytes(b"x" * 1001)
    line = b'{"text": "' + b"x" * 988 + b'"}'
    (tmp_path / "c.jsonl").write_bytes(line + b"\n" + line.replace(b"xx", b"xxx", 1) + b"\n" + line)
    pq.write_table(pa.table({"text": ["x" * 1000, "x" * 1001]}), tmp_path / "d.parquet")
    assert len(line) == 1000
    assert problems(read(tmp_path, limit=1000)) == [None, "oversize", None, "oversize", None, None, "oversize"]


def zeros(path, *, head, tail, megabytes=200):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(bytes(2**20))
        file.write(tail)


@pytest.mark.parametrize("name", ["huge.txt", "huge.txt.gz", "huge.jsonl.gz"])
def test_huge_document_is_oversize_in_bounded_memory(tmp_path, name):
    file = tmp_path / name
    if name == "huge.txt":
        with file.open("wb") as sparse:
            sparse.truncate(200 * 2**20)
    elif name == "huge.txt.gz":
        zeros(file, head=b"", tail=b"")
    else:
        zeros(file, head=b'{"text": "before"}\n{"text": "', tail=b'"}\n{"text": "after"}\n')
    read(tmp_path / name, limit=10)  # what is imported on the way is not the document's memory
    tracemalloc.start()
    documents = read(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = [None, "oversize", None] if "jsonl" in name else ["oversize"]
    assert problems(documents) == expected
    assert peak < 5 * LIMIT


def test_compressed_parquet_is_unpacked_to_disk_and_a_full_disk_says_so(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(CONTENTS["parquet"][1]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StorageFull):
        read(tmp_path)


def test_folder_of_data_files_is_read_through_datasets(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "test.jsonl").write_bytes(as_jsonl([{"text": "held", "author": "Cy"}]))
    documents = read(tmp_path, format="datasets", group_field="author")
    assert [(document.text, document.group) for document in documents] == [
        ("Grün ist\nder Weg.", "Ada"),
        ("A second one.", "Bo"),
    ]
    assert texts(read(tmp_path, format="datasets", split="test")) == ["held"]
    assert len(list_source(source(tmp_path, format="datasets"))) == 2


@pytest.mark.parametrize("with_splits", [True, False])
def test_folder_that_save_to_disk_left_is_read_through_datasets(tmp_path, with_splits):
    import datasets

    rows = datasets.Dataset.from_list([*ROWS, {"text": None, "author": "Cy"}, {"text": "x" * 50, "author": "Cy"}])
    saved = datasets.DatasetDict({"train": rows}) if with_splits else rows
    saved.save_to_disk(tmp_path / "saved")
    documents = read(tmp_path / "saved", format="datasets", limit=40)
    assert texts(documents) == ["Grün ist\nder Weg.", "A second one.", None, None]
    assert problems(documents) == [None, None, "malformed", "oversize"]
    if with_splits:
        with pytest.raises(SourceUnreadable, match=r"no split 'validation'.*train"):
            read(tmp_path / "saved", format="datasets", split="validation")


def test_column_of_a_data_set_that_is_not_asked_for_is_not_decoded(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "scan": datasets.Image()})
    row = {"text": "one", "scan": {"bytes": b"no picture", "path": None}}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "saved")
    assert texts(read(tmp_path / "saved", format="datasets")) == ["one"]


def test_what_datasets_refuses_is_refused_by_name(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    with pytest.raises(SourceUnreadable, match=r"no column 'body'.*text, author"):
        read(tmp_path, format="datasets", text_field="body")
    with pytest.raises(SourceUnreadable, match="validation"):
        read(tmp_path, format="datasets", split="validation")
    (tmp_path / "train.jsonl").write_bytes(b'{"text": \xff}\n{')
    with pytest.raises(SourceUnreadable, match="cannot read it"):
        read(tmp_path, format="datasets")


def test_configurations_of_a_data_set_are_chosen_by_name(tmp_path):
    names = ("raw", "clean")
    described = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{described}---\n")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl([{"text": name}]))
    assert texts(read(tmp_path, format="datasets", configuration="clean")) == ["clean"]
    assert texts(read(tmp_path, format="datasets", configuration="raw")) == ["raw"]
    with pytest.raises(SourceUnreadable, match=r"has several configurations, so set `configuration`.*clean"):
        read(tmp_path, format="datasets")
    with pytest.raises(SourceUnreadable, match="neat"):
        read(tmp_path, format="datasets", configuration="neat")


def test_data_set_that_cannot_be_reached_is_named_as_a_reason_to_try_again():
    with pytest.raises(SourceUnavailable, match=r"nobody/nothing-of-this-name.*ConnectionError"):
        list_source(source("nobody/nothing-of-this-name", format="datasets"))


def test_files_of_a_named_data_set_carry_what_tells_their_versions_apart(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    load = datasets.load_dataset_builder
    chosen = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _, **how: chosen.append(how) or load(str(tmp_path)))
    first = list_source(source("somebody/letters", format="datasets"))
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    second = list_source(source("somebody/letters", format="datasets"))
    assert [file.uri for file in first] == [file.uri for file in second] == [str(tmp_path / "train.jsonl")]
    assert first[0].version != second[0].version
    list_source(source("somebody/letters", format="datasets", configuration="raw"))
    assert chosen == [{}, {}, {"name": "raw"}]
