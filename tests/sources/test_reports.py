"""Reports of other projects on reading folders, encodings, compressed JSON Lines and Parquet, tried here."""

import bz2
import gzip
import json
import lzma

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from softshard.config import SourceSettings
from softshard.errors import SourceUnreadable
from softshard.sources.read import read_documents

PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def read(path, **changes):
    values = {"name": "s", "uri": str(path), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return list(read_documents(SourceSettings.model_validate({**values, **changes}), max_document_bytes=2**20))


def texts(path, **changes):
    return [document.text for document in read(path, **changes)]


def lines(*values):
    return "".join(json.dumps({"text": value}, ensure_ascii=False) + "\n" for value in values).encode()


@pytest.mark.parametrize("packed", ["gz", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_compressed_file_without_its_ending_is_read(tmp_path, packed, kind):
    content = lines("Grün", "two") if kind == "jsonl" else "Grün".encode("utf-16")
    (tmp_path / f"a.{kind}").write_bytes(PACK[packed](content))
    assert texts(tmp_path) == (["Grün", "two"] if kind == "jsonl" else ["Grün"])
    (tmp_path / f"a.{kind}").write_bytes(PACK[packed](content)[:-5])
    with pytest.raises(SourceUnreadable, match=rf"a\.{kind}: source 's': cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("packed", PACK)
def test_every_member_of_a_compressed_file_is_read(tmp_path, packed):
    members = [PACK[packed](lines(f"member {number}")) for number in range(3)]
    (tmp_path / f"a.jsonl.{packed}").write_bytes(b"".join(members))
    assert texts(tmp_path) == ["member 0", "member 1", "member 2"]
    (tmp_path / f"a.jsonl.{packed}").write_bytes(b"".join(members)[:-5])
    with pytest.raises(SourceUnreadable, match=f"a.jsonl.{packed}"):
        read(tmp_path)


def test_a_bad_line_ends_neither_the_file_nor_the_source(tmp_path):
    bad = b'{"text": "with NaN", "weight": NaN}\nx\n \t\n'
    (tmp_path / "a.jsonl").write_bytes(lines("one") + bad + lines("two"))
    assert texts(tmp_path) == ["one", "with NaN", None, "two"]


def test_a_line_separator_inside_of_a_text_ends_no_line(tmp_path):
    odd = "one\u2028still one\u2029still\x85still\x0bstill\x1cone"
    (tmp_path / "a.jsonl").write_bytes(lines(odd, "two"))
    assert texts(tmp_path) == [odd, "two"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.txt").write_text(f"{odd.replace(chr(0x1C), '')}\ntwo\n")
    assert len(texts(tmp_path, split_texts="lines")) == 2


def test_a_partition_without_a_value_is_not_one_of_null(tmp_path):
    rows = pl.DataFrame({"text": ["1", "2", "3", "4"], "author": ["", "Ada", "Bo/Cy", None]})
    rows.write_parquet(pl.PartitionBy(tmp_path, key=["author"], include_key=False))
    groups = {document.text: document.group for document in read(tmp_path, group_field="author")}
    assert groups == {"1": "", "2": "Ada", "3": "Bo/Cy", "4": "s"}


def test_a_file_whose_other_columns_hold_nothing_has_its_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "author": null, "tags": []}\n{"text": "two", "author": "Ada"}\n')
    pq.write_table(pa.table({"text": ["three"], "author": pa.nulls(1)}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.nulls(1), "author": ["Bo"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["four"], "author": ["Bo"]}), tmp_path / "d.parquet")
    found = [(document.text, document.group) for document in read(tmp_path, group_field="author")]
    assert found == [("one", "s"), ("two", "Ada"), ("three", "s"), ("four", "Bo")]


def test_a_half_uploaded_file_is_named_and_not_taken_for_a_whole_one(tmp_path):
    whole = gzip.compress(lines(*(f"{number} " * 999 for number in range(200))))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceUnreadable, match=r"a\.jsonl\.gz: source 's': cannot be read: .*end-of-stream"):
        read(tmp_path)
    (tmp_path / "a.jsonl.gz").unlink()
    (tmp_path / "b.jsonl").write_bytes(lines("one", "two")[:-4])
    assert [document.problem for document in read(tmp_path)] == [None, "malformed"]
