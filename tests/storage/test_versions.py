"""The version of an input changes with its content, whatever its file system calls what it knows of the file."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fakes.http_server import web  # noqa: F401
from softshard.config import SourceSettings
from softshard.sources.read import list_versions
from softshard.storage import list_inputs


class Remembering(MemoryFileSystem):
    """Lists a folder once, and then says what it said, as file systems of object stores do."""

    protocol = "remembering"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    listed: ClassVar = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("remembering://", "memory://"))

    def ls(self, path, detail=True, **kwargs):
        if path not in self.listed:
            self.listed[path] = super().ls(path, detail=True, **kwargs)
        return self.listed[path] if detail else [item["name"] for item in self.listed[path]]

    def invalidate_cache(self, path=None):
        self.listed.clear()


def test_a_file_that_was_added_after_the_last_listing_of_this_process_is_seen():
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    about = {"style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    source = SourceSettings(name="s", uri="remembering://box", **about)
    file_system = fsspec.filesystem("remembering")
    for name in ("a.txt", "b.txt"):
        file_system.pipe(f"/box/{name}", b"text")
        found = [uri.rsplit("/", 1)[1] for uri, _ in list_versions(source)]
    assert found == ["a.txt", "b.txt"]


class Telling(MemoryFileSystem):
    """Tells of a file what `told` holds, and its size."""

    protocol = "telling"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    told: ClassVar = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("telling://", "memory://"))

    def info(self, path, **kwargs):
        info = super().info(path, **kwargs)
        return {"name": info["name"], "size": info["size"], "type": info["type"], **self.told}


@pytest.fixture
def telling(monkeypatch):
    fsspec.register_implementation("telling", Telling, clobber=True)
    monkeypatch.setattr(Telling, "store", {})
    file_system = fsspec.filesystem("telling")
    file_system.pipe("/box/a.txt", b"one")

    def version(**told):
        monkeypatch.setattr(Telling, "told", told)
        (file,) = list_inputs("telling://box/a.txt", source="s")
        return file.version

    return version


EARLY, LATE = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"etag": "0x1", "last_modified": EARLY}, {"etag": "0x2", "last_modified": EARLY}),
        ({"last_modified": EARLY, "creation_time": EARLY}, {"last_modified": LATE, "creation_time": EARLY}),
        ({"Last-Modified": "Thu, 01 Jan 2026"}, {"Last-Modified": "Fri, 02 Jan 2026"}),
        ({"blob_id": "aa", "lfs": None}, {"blob_id": "bb", "lfs": None}),
        ({"mtime": 1.5, "created": 1.0}, {"mtime": 2.5, "created": 1.0}),
        ({"created": EARLY}, {"created": LATE}),
        ({"CRC": 1, "date_time": (1980, 1, 1, 0, 0, 0)}, {"CRC": 2, "date_time": (1980, 1, 1, 0, 0, 0)}),
        ({"generation": "7", "md5Hash": "a=="}, {"generation": "8", "md5Hash": "a=="}),
    ],
    ids=lambda told: "-".join(told),
)
def test_new_content_of_the_same_size_has_another_version(telling, before, after):
    assert telling(**before) != telling(**after)
    assert telling(**before) == telling(**before)


@pytest.mark.parametrize("told", [{"atime": 1}, {"mtime": 1, "created": 1}, {"mtime": 1, "nlink": 1}], ids=repr)
def test_what_changes_without_the_content_is_not_in_the_version(telling, told):
    last = list(told)[-1]
    assert telling(**told) == telling(**{**told, last: 2})


def test_a_file_of_which_nothing_is_known_is_known_by_its_content(telling):
    about = {"style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    source = SourceSettings(name="s", uri="telling://box/a.txt", **about)
    assert telling() is None
    ((_, before),) = list_versions(source)
    fsspec.filesystem("telling").pipe("/box/a.txt", b"two")
    ((_, after),) = list_versions(source)
    fsspec.filesystem("telling").pipe("/box/a.txt", b"one")
    assert before != after
    assert list_versions(source)[0][1] == before


@pytest.mark.parametrize("header", ["Last-Modified", "ETag", "Content-MD5", None])
@pytest.mark.parametrize("length", ["known", "unknown"])
def test_a_page_that_is_written_again_has_another_version(web, header, length):  # noqa: F811
    about = {"style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    source = SourceSettings(name="s", uri=f"{web.url}/a.txt", **about)
    fixed = {} if length == "known" else {"Transfer": "unknown length"}
    versions = []
    for number, content in enumerate((b"one", b"two", b"two")):
        web.files["/a.txt"] = content
        web.headers["/a.txt"] = {**fixed, **({header: f"value {min(number, 1)}"} if header else {})}
        versions.append(list_versions(source)[0][1])
    assert versions[0] != versions[1] == versions[2]
