"""Sources that lie in a bucket, on a server that fails now and then."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from fakes.s3_server import cut_reply, moto, proxy, refuse, slow_down, spoiled_server  # noqa: F401
from softshard.config import SourceSettings
from softshard.errors import EXIT_TRY_AGAIN, SourceUnavailable, SourceUnreadable, StoreUnavailable, StoreUnusable
from softshard.sources.not_read import NotRead
from softshard.sources.read import list_source, read_documents
from softshard.storage import ObjectStore, list_inputs, open_input
from softshard.storage.s3 import RetryPolicy

TEXTS = [f"Document {n}. It rained. " * 20 for n in range(40)]


def source(uri, **changes):
    return SourceSettings(name="tales", uri=uri, style="literary", license="CC0-1.0", rights_basis="owned", **changes)


def texts_of(uri, **changes):
    return [document.text for document in read_documents(source(uri, **changes), max_document_bytes=10**6)]


@pytest.fixture
def bucket(proxy, request):  # noqa: F811
    return ObjectStore(f"s3://box/{request.node.name.split('[')[0][:40]}")


def packed(ending):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if ending == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": TEXTS}), sink, row_group_size=7)
        return sink.getvalue()
    return {
        "jsonl": lambda: lines,
        "jsonl.gz": lambda: gzip.compress(lines),
        "jsonl.zst": lambda: zstandard.ZstdCompressor().compress(lines),
    }[ending]()


@pytest.mark.parametrize("failure", [None, slow_down, cut_reply, refuse("InternalError", 500)])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_documents_are_read_whole_whatever_fails_in_passing(bucket, proxy, ending, failure):  # noqa: F811
    bucket.replace(f"tales.{ending}", packed(ending))
    if failure is not None:
        proxy.spoil(failure, "GET", "HEAD", times=2)
    assert texts_of(f"{bucket.uri}/tales.{ending}") == TEXTS
    assert proxy.spoiled == (2 if failure else 0)


def test_folders_and_globs_are_listed_in_order_without_hidden_files(bucket):
    for name in ("b.txt", "a.txt", ".hidden.txt", "sub/c.txt", ".git/d.txt", "sub/e.md", "x*y.txt"):
        bucket.replace(name, name.encode())
    uri = bucket.uri

    def names(pattern):
        return [file.uri.removeprefix(f"{uri}/") for file in list_inputs(pattern, source="s")]

    assert names(uri) == names(f"{uri}/") == ["a.txt", "b.txt", "sub/c.txt", "sub/e.md", "x*y.txt"]
    assert names(f"{uri}/*.txt") == ["a.txt", "b.txt", "x*y.txt"]
    assert names(f"{uri}/**/*.md") == ["sub/e.md"]
    assert names(f"{uri}/x*y.txt") == ["x*y.txt"], "a name is taken as it stands before it is taken for a glob"
    assert names(f"{uri}/[ab].txt") == ["a.txt", "b.txt"]
    with open_input(f"{uri}/sub/c.txt") as stream:
        assert stream.read() == b"sub/c.txt"


def test_of_a_bucket_too_what_is_no_data_is_left_out_and_named(bucket):
    for name in ("README.md", "part.jsonl", "_SUCCESS", "_temporary/0/part.jsonl", "lang=en/part.jsonl", "a.csv"):
        bucket.replace(name, b'{"text": "one"}\n')

    def read(uri, **changes):
        not_read = NotRead()
        found = read_documents(source(uri, **changes), max_document_bytes=10**6, not_read=not_read)
        return [document.group for document in found], not_read.kinds

    every = {".csv": 1, "_*": 2, "README or LICENSE": 1}
    assert read(bucket.uri) == (["tales", "tales"], every)
    assert read(f"{bucket.uri}/**") == (["tales", "tales"], every)
    assert read(f"{bucket.uri}/*") == (["tales"], {"folder": 2, ".csv": 1, "README or LICENSE": 1, "_*": 1})
    assert read(f"{bucket.uri}/_temporary/**") == (["tales"], {})
    assert read(f"{bucket.uri}/lang=*/*.jsonl", group_field="lang") == (["en"], {})
    with pytest.raises(SourceUnreadable, match=r"matches no file but 1 folder\(s\); add /\*\*"):
        read(f"{bucket.uri}/lang=*")


def test_the_version_of_an_input_is_that_of_its_content(bucket):
    def version():
        (file,) = list_source(source(f"{bucket.uri}/a.txt"))
        (listed,) = list_source(source(bucket.uri))
        assert listed == file
        return file.version

    bucket.replace("a.txt", b"one")
    before = version()
    bucket.replace("a.txt", b"two")
    assert version() != before
    bucket.replace("a.txt", b"one")
    assert version() == before


def test_an_input_that_is_replaced_while_it_is_read_is_named(bucket):
    lines = "".join(json.dumps({"text": f"{n} " * 5000}) + "\n" for n in range(900)).encode()
    assert len(lines) > 2 * 4 * 2**20, "more than one request fetches"
    bucket.replace("a.jsonl", lines)
    documents = read_documents(source(f"{bucket.uri}/a.jsonl"), max_document_bytes=10**6)
    next(documents)
    bucket.replace("a.jsonl", lines[::-1])
    with pytest.raises(SourceUnavailable, match=r"a\.jsonl.*replaced while it was read"):
        list(documents)


def test_what_is_not_there_is_named(bucket):
    with pytest.raises(SourceUnreadable, match=f"{bucket.uri}/nowhere: source 'tales'"):
        list_source(source(f"{bucket.uri}/nowhere"))
    with pytest.raises(StoreUnusable, match="no such bucket"):
        list_source(source("s3://nowhere/tales"))


def test_a_server_that_is_away_is_a_reason_to_try_again_and_not_bad_data(bucket, proxy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "softshard.storage.inputs.RetryPolicy", lambda: RetryPolicy(attempts=3, first_pause_seconds=0.01)
    )
    bucket.replace("a.jsonl", packed("jsonl"))
    documents = read_documents(source(f"{bucket.uri}/a.jsonl"), max_document_bytes=10**6)
    proxy.spoil(slow_down, "GET", times=100)
    with pytest.raises(StoreUnavailable) as caught:
        next(documents)
    assert caught.value.exit_code == EXIT_TRY_AGAIN
    with pytest.raises(StoreUnavailable):
        list_source(source(bucket.uri))
