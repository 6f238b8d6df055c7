"""The table of stores: which URIs are outputs, and what a URI lacks."""

import pytest

from softshard.errors import JobInvalid
from softshard.storage import LocalStore, ObjectStore, open_store
from softshard.storage.location import OUTPUT_FORMS, STORES, find_store_kind, find_uri_problem


def test_every_kind_of_store_takes_its_own_example():
    for kind in STORES:
        assert kind.example.startswith(kind.scheme)
        assert find_store_kind(kind.example) is kind
        assert find_uri_problem(kind.example) is None
        assert kind.example in OUTPUT_FORMS


def test_a_uri_opens_the_store_of_its_kind(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)
    assert isinstance(open_store("s3://bucket/run"), ObjectStore)


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("gs://bucket/run", r"must be a local folder or s3://bucket/prefix"),
        ("s3:///run", r"has no bucket where one should be: s3://bucket/prefix"),
        ("s3://key:secret@bucket/run", "holds a credential"),
    ],
)
def test_another_uri_is_refused(uri, problem):
    with pytest.raises(JobInvalid, match=problem) as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)
