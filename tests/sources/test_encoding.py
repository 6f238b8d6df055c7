"""Text in other encodings than UTF-8."""

import codecs
import io

import pytest

from softshard.config import SourceSettings
from softshard.sources.encoding import as_utf8
from softshard.sources.read import read_documents

TEXT = "„Grün“ – naïve Œuvre.\n" * 9000


def read(path, *, limit=2**20, **changes):
    values = {"name": "s", "uri": str(path), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    source = SourceSettings.model_validate({**values, **changes})
    return [(document.text, document.problem) for document in read_documents(source, max_document_bytes=limit)]


@pytest.mark.parametrize("encoding", ["windows-1252", "utf-16", "utf-16-le", "utf-32", "gb18030", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_is_read_in_the_encoding_of_its_source(tmp_path, encoding, kind):
    line = '{"text": "Grün – Œuvre"}\n'
    (tmp_path / f"a.{kind}").write_bytes((TEXT if kind == "txt" else line * 2).encode(encoding))
    expected = [TEXT] if kind == "txt" else ["Grün – Œuvre"] * 2
    assert read(tmp_path, encoding=encoding) == [(text, None) for text in expected]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("said", ["utf-8", "windows-1252"])
def test_a_byte_order_mark_says_more_than_the_settings(tmp_path, encoding, said):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read(tmp_path, encoding=said) == [(TEXT, None)]


def test_utf16_of_the_other_byte_order_is_read_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"))
    assert read(tmp_path) == [(TEXT, None)]


@pytest.mark.parametrize(
    ("encoding", "bad"), [("windows-1252", b"\x81"), ("utf-16-le", b"\x00\xd8x\x00"), ("shift_jis", b"\x81\x00")]
)
def test_what_cannot_be_decoded_spoils_its_own_line_alone(tmp_path, encoding, bad):
    lines = ['{"text": "one"}\n'.encode(encoding), '{"text": "'.encode(encoding) + bad + '"}\n'.encode(encoding)]
    (tmp_path / "a.jsonl").write_bytes(lines[0] + lines[1] + lines[0])
    assert read(tmp_path, encoding=encoding) == [("one", None), (None, "undecodable"), ("one", None)]


def test_json_lines_in_utf16_without_a_mark_are_undecodable_and_not_malformed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode("utf-16-le"))
    assert {problem for _, problem in read(tmp_path)} == {"undecodable"}
    assert read(tmp_path, encoding="utf-16-le") == [("one", None), ("two", None)]


def test_half_a_character_at_the_end_is_undecodable(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16") + b"x")
    assert read(tmp_path) == [(None, "undecodable")]


def test_the_limit_is_in_bytes_of_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(("é" * 500).encode("windows-1252"))
    assert read(tmp_path, encoding="windows-1252", limit=1000) == [("é" * 500, None)]
    assert read(tmp_path, encoding="windows-1252", limit=999) == [(None, "oversize")]


def test_a_stream_that_gives_a_byte_at_a_time_is_read_whole():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 1))

    assert as_utf8(Slow("Grün".encode("utf-16")), encoding="utf-8").read() == "Grün".encode()
