"""Servers that are away, and files that go away, while sources are listed and read."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import ssl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fakes.http_server import cut, status, web  # noqa: F401
from softshard.config import SourceSettings
from softshard.errors import EXIT_DATA, EXIT_TRY_AGAIN, SourceUnavailable, SourceUnreadable
from softshard.sources.read import list_source, read_documents
from softshard.storage import find_outage

TEXT = "It rained, and the boats stayed in. " * 50


def source(uri, **changes):
    values = {"name": "tales", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    return SourceSettings.model_validate({**values, **changes})


def read(uri, **changes):
    return list(read_documents(source(uri, **changes), max_document_bytes=2**20))


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_server_that_is_overloaded_when_it_is_listed_is_a_reason_to_try_again(web, code):  # noqa: F811
    web.failures["/a.txt"] = status(code)
    with pytest.raises(SourceUnavailable, match=rf"/a\.txt.*HTTP {code}.*run the same command again") as caught:
        list_source(source(f"{web.url}/a.txt"))
    assert caught.value.exit_code == EXIT_TRY_AGAIN


@pytest.mark.parametrize("code", [401, 403, 404, 410, 501])
def test_a_server_that_refuses_a_file_is_not_asked_again(web, code):  # noqa: F811
    web.failures["/a.txt"] = status(code)
    with pytest.raises(SourceUnreadable) as caught:
        list_source(source(f"{web.url}/a.txt"))
    assert caught.value.exit_code == EXIT_DATA


def test_a_server_that_refuses_connections_is_a_reason_to_try_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SourceUnavailable, match="ConnectionRefusedError"):
        list_source(source(f"http://127.0.0.1:{port}/a.txt"))


def as_parquet(text):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue()


CONTENTS = {
    "a.txt": TEXT.encode(),
    "a.txt.gz": gzip.compress(TEXT.encode()),
    "a.txt.zst": zstandard.ZstdCompressor().compress(TEXT.encode()),
    "a.parquet": as_parquet(TEXT),
}


@pytest.mark.parametrize("failure", [cut, status(503)], ids=["cut", "503"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_server_that_fails_while_it_is_read_is_a_reason_to_try_again(web, name, failure):  # noqa: F811
    web.files[f"/{name}"] = CONTENTS[name]
    assert [document.text for document in read(f"{web.url}/{name}")] == [TEXT]
    web.fail_after_listing(f"/{name}", failure)
    with pytest.raises(SourceUnavailable, match=f"{web.url}/{name}"):
        read(f"{web.url}/{name}")


def test_a_file_that_goes_between_listing_and_reading_is_a_reason_to_try_again(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    documents = read_documents(source(tmp_path), max_document_bytes=2**20)
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(SourceUnavailable, match=r"b\.txt.*it was listed and is gone"):
        next(documents)


def test_a_page_that_goes_between_listing_and_reading_is_a_reason_to_try_again(web):  # noqa: F811
    web.files["/a.txt"] = TEXT.encode()
    web.fail_after_listing("/a.txt", status(404))
    with pytest.raises(SourceUnavailable, match="it was listed and is gone"):
        read(f"{web.url}/a.txt")


def test_a_link_to_nothing_is_refused_because_it_will_never_be_read(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceUnreadable, match=r"a\.txt"):
        read(tmp_path)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("a.txt"), None),
        (caused(FileNotFoundError("a.txt"), ConnectionResetError()), "ConnectionResetError"),
        (TimeoutError(), "TimeoutError"),
        (OSError(os.strerror(116), 116), None),
        (OSError(116, "Stale file handle"), "Stale file handle"),
        (OSError(113, "No route to host"), "No route to host"),
        (
            socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
            "Temporary failure in name resolution",
        ),
        (caused(FileNotFoundError(), socket.gaierror(socket.EAI_NONAME, "Name not known")), "Name not known"),
        (caused(ConnectionError(), ssl.SSLCertVerificationError("expired")), None),
        (ValueError("503"), None),
    ],
    ids=repr,
)
def test_an_outage_is_told_from_other_errors_by_the_whole_chain_of_causes(error, reason):
    assert find_outage(error) == reason


def lines_of(word, number):
    return "".join(json.dumps({"text": f"{word} {i} " * 500}) + "\n" for i in range(number)).encode()


@pytest.mark.parametrize("later", [lines_of("two", 2000), lines_of("two", 200)], ids=["replaced", "shorter"])
def test_a_page_that_changes_while_it_is_read_is_not_taken_for_whole(web, later):  # noqa: F811
    web.files["/a.jsonl"] = lines_of("one", 2000)
    assert len(web.files["/a.jsonl"]) > 8 * 2**20, "more than one request fetches"
    web.headers["/a.jsonl"] = {"Last-Modified": "Thu, 01 Jan 2026"}
    documents = read_documents(source(f"{web.url}/a.jsonl"), max_document_bytes=2**20)
    next(documents)
    web.files["/a.jsonl"] = later
    web.headers["/a.jsonl"] = {"Last-Modified": "Fri, 02 Jan 2026"}
    with pytest.raises(SourceUnavailable, match=r"a\.jsonl.*it changed while it was read"):
        list(documents)


def test_a_page_of_a_server_that_sends_no_parts_is_read_or_refused_by_name(web):  # noqa: F811
    web.files["/a.jsonl"] = lines_of("one", 2000)
    web.headers["/a.jsonl"] = {"Accept-Ranges": "none"}
    assert len(read(f"{web.url}/a.jsonl")) == 2000
    web.files["/b.jsonl"] = lines_of("one", 6000)
    web.whole_only.add("/b.jsonl")
    with pytest.raises(SourceUnreadable, match=r"b\.jsonl.*the server sends no parts of a file; download it"):
        read(f"{web.url}/b.jsonl")


@pytest.mark.parametrize("ranges", [{}, {"Accept-Ranges": "none"}], ids=["parts", "whole"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_page_that_is_compressed_in_transfer_is_read_whole(web, name, ranges):  # noqa: F811
    web.files[f"/{name}"] = gzip.compress(TEXT.encode())
    web.headers[f"/{name}"] = {"Content-Encoding": "gzip", **ranges}
    assert [document.text for document in read(f"{web.url}/{name}")] == [TEXT]


@pytest.mark.parametrize("name", ["a[1].txt", "a::b.txt", "a#b.txt", "a%41.txt", "a*.txt", "a?.txt"])
def test_a_file_whose_name_means_something_to_fsspec_is_read_by_its_name(tmp_path, name):
    (tmp_path / name).write_text("one")
    (tmp_path / "aA.txt").write_text("two")
    assert sorted(document.text for document in read(tmp_path)) == ["one", "two"]


def test_an_outage_that_a_data_set_takes_for_a_missing_file_is_a_reason_to_try_again(monkeypatch):
    import datasets

    class Rows:
        column_names = None

        def __iter__(self):
            yield {"text": TEXT}
            raise caused(FileNotFoundError("train/1.jsonl.zst"), TimeoutError("no answer"))

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    documents = read_documents(source("somebody/letters", format="datasets"), max_document_bytes=2**20)
    assert next(documents).text == TEXT
    with pytest.raises(SourceUnavailable, match="TimeoutError"):
        next(documents)
