"""The table of formats: what the settings, their schema and the reference take from it."""

import json

import pytest

from softshard.config import SourceSettings
from softshard.sources import formats, read
from softshard.sources.documents import make_document
from softshard.sources.formats import FORMATS, FileFormat, describe_endings


def source(uri, **changes):
    values = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return SourceSettings.model_validate({**values, **changes})


def test_settings_and_schema_have_the_formats_of_the_table():
    field = SourceSettings.model_json_schema()["properties"]["format"]
    assert field["enum"] == ["auto", *FORMATS]
    assert field["default"] == "auto"
    for name in FORMATS:
        assert source("somewhere", format=name).format == name


def test_the_reference_names_every_ending_once():
    described = describe_endings()
    endings = [ending for item in FORMATS.values() if isinstance(item, FileFormat) for ending in item.endings]
    assert len(set(endings)) == len(endings)
    for ending in endings:
        assert described.count(f"{ending} ") == 1
    assert SourceSettings.model_fields["format"].description == described


def test_a_format_of_files_is_one_reader_and_one_entry(tmp_path, monkeypatch):
    def read_shouted(stream, *, name, source, max_document_bytes):
        yield make_document(
            stream.read().upper(), group=None, name=name, source=source, max_document_bytes=max_document_bytes
        )

    shouted = FileFormat(title="shouted text", endings=(".loud",), read=read_shouted)
    monkeypatch.setitem(formats.FORMATS, "shouted", shouted)
    (tmp_path / "a.loud").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    documents = list(read.read_documents(source(tmp_path), max_document_bytes=100))
    assert [document.text for document in documents] == ["ONE", "two"]
    assert ".loud shouted text" in formats.describe_endings()


@pytest.mark.parametrize("format_name", ["text", "datasets"])
def test_a_source_on_a_hub_is_told_from_files(tmp_path, format_name):
    assert source(tmp_path, format=format_name).hub is None
    hub = source("owner/name", format=format_name).hub
    assert hub == (None if format_name == "text" else "hf://datasets")
    assert "hub" not in json.loads(source(tmp_path).model_dump_json())
