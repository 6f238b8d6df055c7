"""Texts that are split into documents."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softshard.config import SourceSettings
from softshard.sources.read import read_documents

NOTES = """
First line.
still the first.\r

 \t
# Not a comment

Second.
## Sub

```
# a comment in code
```
Third.

# A
## B

Fourth.
"""
LINES = [line for line in NOTES.split("\n") if line.strip()]
EXPECTED = {
    "none": [("", NOTES)],
    "blank_lines": [
        (2, "First line.\nstill the first."),
        (6, "# Not a comment"),
        (8, "Second.\n## Sub"),
        (11, "```\n# a comment in code\n```\nThird."),
        (16, "# A\n## B"),
        (19, "Fourth."),
    ],
    "headings": [
        (2, "First line.\nstill the first."),
        (6, "# Not a comment\n\nSecond."),
        (9, "## Sub\n\n```\n# a comment in code\n```\nThird."),
        (16, "# A\n## B\n\nFourth."),
    ],
}


def read(path, split, *, limit=2**20, **changes):
    values = {"name": "s", "uri": str(path), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    source = SourceSettings.model_validate({**values, "split_texts": split, **changes})
    return list(read_documents(source, max_document_bytes=limit))


def write(folder, kind, text):
    path = folder / f"a.{kind}"
    if kind == "txt":
        path.write_bytes(text.encode())
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [text], "author": ["Ada"]}), path)
    else:
        path.write_text(json.dumps({"text": text, "author": "Ada"}))
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("split", EXPECTED)
def test_texts_are_split_and_named_after_the_line_on_which_they_begin(tmp_path, kind, split):
    path = write(tmp_path, kind, NOTES)
    documents = read(path, split, **({"group_field": "author"} if kind in {"jsonl", "parquet"} else {}))
    place = {"jsonl": ", line 1", "parquet": ", row 1"}.get(kind, "")
    names = [f"file://{path}{place}" + (f", from line {number}" if number else "") for number, _ in EXPECTED[split]]
    assert [(document.name, document.text) for document in documents] == [
        (name, text) for name, (_, text) in zip(names, EXPECTED[split], strict=True)
    ]
    assert {document.group for document in documents} == {"Ada" if place else "s"}


def test_every_line_may_be_a_document(tmp_path):
    documents = read(write(tmp_path, "txt", NOTES), "lines")
    assert [document.text for document in documents] == LINES
    assert [document.name.rsplit(" ", 1)[1] for document in documents[:3]] == ["2", "3", "6"]


def test_a_file_that_is_longer_than_a_document_may_be_is_split(tmp_path):
    path = write(tmp_path, "txt", "one\ntwo\n\n" + "x" * 30 + "\n\n" + "y\n" * 15 + "\nlast\n")
    documents = read(path, "blank_lines", limit=29)
    assert [(document.text, document.problem) for document in documents] == [
        ("one\ntwo", None),
        (None, "oversize"),
        ("\n".join("y" * 15), None),
        ("last", None),
    ]
    assert [document.problem for document in read(path, "blank_lines", limit=28)] == [
        None,
        "oversize",
        "oversize",
        None,
    ]


def test_what_cannot_be_decoded_spoils_its_own_piece_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\nthree\n")
    assert [document.text for document in read(tmp_path, "lines")] == ["one", None, "three"]


def test_max_documents_counts_the_pieces(tmp_path):
    path = write(tmp_path, "txt", "one\ntwo\nthree\n")
    assert [document.text for document in read(path, "lines", max_documents=2)] == ["one", "two"]


def test_texts_that_stand_for_one_that_is_gone_are_dropped(tmp_path):
    rows = [{"text": text} for text in ("[deleted]", " [removed]\n", "[deleted] by me", "kept")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = read(tmp_path, "none", drop_texts=["[deleted]", "[removed]"])
    assert [(document.text, document.problem) for document in documents] == [
        (None, "dropped"),
        (None, "dropped"),
        ("[deleted] by me", None),
        ("kept", None),
    ]
