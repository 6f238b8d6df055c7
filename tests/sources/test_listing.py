"""Which files of a folder or glob are read, and what is said of the others."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from softshard.config import SourceSettings
from softshard.errors import SourceUnreadable
from softshard.sources.not_read import NotRead
from softshard.sources.read import list_source, read_documents


def source(uri, **changes):
    values = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return SourceSettings.model_validate({**values, **changes})


def read(uri, **changes):
    """Texts of the documents, and what is said of the files that are not read."""
    not_read = NotRead()
    documents = list(read_documents(source(uri, **changes), max_document_bytes=2**20, not_read=not_read))
    return [document.text for document in documents], not_read.describe()


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_card_and_licence_beside_data_are_no_documents(tmp_path):
    for name in ("README.md", "LICENSE", "data/license.txt", "COPYING"):
        put(tmp_path, name, b"about the data")
    put(tmp_path, "data/notice.txt", b"one")
    put(tmp_path, "data/train.jsonl", rows("two"))
    texts, said = read(tmp_path)
    assert texts == ["one", "two"]
    assert said == f"4 files not read: 4 README or LICENSE (first: file://{tmp_path}/COPYING)"


def test_readmes_that_are_all_there_is_are_the_documents(tmp_path):
    put(tmp_path, "a/README.md", b"first")
    put(tmp_path, "b/README.md", b"second")
    assert read(tmp_path) == (["first", "second"], "")


def test_readmes_among_prose_are_prose_but_for_the_one_at_the_top(tmp_path):
    for name in ("README.md", "guide.md", "tools/README.md", "tools/use.md", "tools/LICENSE.md"):
        put(tmp_path, name, name.encode())
    texts, said = read(tmp_path)
    assert texts == ["guide.md", "tools/README.md", "tools/use.md"]
    assert said.startswith("2 files not read: 2 README or LICENSE (first: ")
    put(tmp_path, "tools/rows.jsonl", rows("one"))
    assert read(tmp_path)[0] == ["guide.md", "one", "tools/use.md"]


@pytest.mark.parametrize("uri", ["README.md", "*.md", "READ*", "**/README*"])
def test_a_readme_that_is_named_is_read(tmp_path, uri):
    put(tmp_path, "README.md", b"named")
    put(tmp_path, "b.jsonl", rows("other"))
    assert read(tmp_path / uri) == (["named"], "")


@pytest.mark.parametrize("uri", ["", "**", "*"])
def test_a_bare_star_names_nothing(tmp_path, uri):
    put(tmp_path, "README.md", b"about")
    put(tmp_path, "_SUCCESS", b"")
    put(tmp_path, "b.jsonl", rows("one"))
    texts, said = read(tmp_path / uri)
    assert texts == ["one"]
    assert said.startswith("2 files not read: 1 README or LICENSE, 1 _* (first: ")


def test_what_spark_has_not_finished_is_no_data(tmp_path):
    put(tmp_path, "part-0.jsonl", rows("one"))
    put(tmp_path, "_temporary/0/part-0.jsonl", rows("one"))
    put(tmp_path, "_SUCCESS", b"")
    for uri in (tmp_path, tmp_path / "**/*.jsonl"):
        assert read(uri)[0] == ["one"]
    assert read(tmp_path)[1].startswith("2 files not read: 2 _* (first: ")
    assert read(tmp_path / "_temporary")[0] == ["one"], "a folder that is named is read"
    assert read(tmp_path / "_temporary/**/*.jsonl")[0] == ["one"]


def test_every_file_that_is_not_read_is_counted_by_its_ending(tmp_path):
    put(tmp_path, "README.md", b"# C4")
    for name in ("en/1.json.gz", "en/2.json.gz", "rows.csv", "noise"):
        put(tmp_path, name, b"x")
    put(tmp_path, "rows.jsonl", rows("one"))
    texts, said = read(tmp_path)
    assert texts == ["one"]
    listed = "2 .json.gz, 1 .csv, 1 without an ending, 1 README or LICENSE"
    assert said == f"5 files not read: {listed} (first: file://{tmp_path}/en/1.json.gz)"


def test_a_folder_whose_data_auto_does_not_know_is_refused_and_the_way_out_named(tmp_path):
    put(tmp_path, "README.md", b"# C4")
    put(tmp_path, "en/1.json.gz", gzip.compress(rows("one", "two")))
    with pytest.raises(SourceUnreadable, match=r"each line of a \.json file is one object, set `format: jsonl`"):
        read(tmp_path)
    assert read(tmp_path, format="jsonl")[0] == ["one", "two"]


@pytest.mark.parametrize("ending", [".GZ", ".zst", ".bz2", ".xz"])
def test_compressed_files_are_known_by_their_ending_in_either_case(tmp_path, ending):
    pack = {".GZ": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    path = put(tmp_path, f"ROWS.JSONL{ending}", pack(rows("one", "two")))
    assert read(tmp_path) == (["one", "two"], "")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceUnreadable, match="ROWS"):
        read(tmp_path)


@pytest.mark.parametrize("uri", ["data", "data/**", "data/**/*.jsonl", "data/*/*.jsonl"])
def test_folders_that_links_lead_to_are_read_once_each(tmp_path, uri):
    put(tmp_path, "data/own/a.jsonl", rows("one"))
    put(tmp_path, "elsewhere/b.jsonl", rows("two"))
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data/own")
    assert sorted(read(tmp_path / uri)[0]) == ["one", "two"]


def test_a_link_changes_no_name_of_a_file_that_is_there_without_it(tmp_path):
    put(tmp_path, "z/a.jsonl", rows("one"))
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert [file.uri for file in list_source(source(tmp_path))] == [f"file://{tmp_path}/z/a.jsonl"]


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    put(tmp_path, "a.jsonl", rows("one"))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(SourceUnreadable, match=r"b\.jsonl"):
        read(tmp_path)


def test_a_name_that_is_not_utf8_is_named_in_utf8(tmp_path):
    put(tmp_path, "a.jsonl", rows("one"))
    (tmp_path / os.fsdecode(b"b\xff\n.csv")).touch()
    assert read(tmp_path) == (["one"], f"1 file not read: 1 .csv (first: file://{tmp_path}/b\\udcff .csv)")


def test_a_pipe_is_not_waited_for(tmp_path):
    put(tmp_path, "a.jsonl", rows("one"))
    os.mkfifo(tmp_path / "b.jsonl")
    assert read(tmp_path)[0] == ["one"]


def test_folders_that_a_glob_matches_are_named(tmp_path):
    put(tmp_path, "2019/a.jsonl", rows("old"))
    put(tmp_path, "b.jsonl", rows("new"))
    texts, said = read(tmp_path / "*")
    assert texts == ["new"]
    assert said == f"1 file not read: 1 folder (first: file://{tmp_path}/2019)"
    with pytest.raises(SourceUnreadable, match=r"matches no file but 1 folder\(s\); add /\*\*"):
        read(tmp_path / "20*")
    assert read(tmp_path / "20*/**")[0] == ["old"]


def test_files_without_a_document_do_not_end_the_source(tmp_path):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    for name in ("d.parquet", "e.jsonl.zst", "f.txt"):
        put(tmp_path, name, b"")
    assert read(tmp_path) == (["one"], f"5 files not read: 5 empty (first: file://{tmp_path}/b.parquet)")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_the_folders_of_a_partition_name_the_group(tmp_path, kind):
    for author, text in (("Ada%20L", "one"), ("Bo", "two"), ("__HIVE_DEFAULT_PARTITION__", "three")):
        folder = tmp_path / f"lang=en/author={author}"
        folder.mkdir(parents=True)
        if kind == "parquet":
            pq.write_table(pa.table({"text": [text]}), folder / "part.parquet")
        else:
            put(folder, f"part.{kind}", rows(text) if kind == "jsonl" else text.encode())
    documents = read_documents(source(tmp_path, group_field="author"), max_document_bytes=99)
    groups = {document.text: document.group for document in documents}
    assert groups == {"one": "Ada L", "two": "Bo", "three": "letters"}
