import errno
import gzip
import os
import subprocess
import sys

import pytest
import zstandard

from fakes.http_server import web  # noqa: F401
from softshard.errors import JobInvalid, OutputUnusable, PartConflict, SourceUnreadable
from softshard.storage import LocalStore, list_inputs, open_input


def test_put_once_adopts_equal_bytes_and_refuses_others(tmp_path):
    store = LocalStore(tmp_path)
    store.put_once("a/b.bin", b"one")
    store.put_once("a/b.bin", b"one")
    with pytest.raises(PartConflict):
        store.put_once("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"one"


def test_create_exclusive_creates_only_once(tmp_path):
    store = LocalStore(tmp_path)
    assert store.create_exclusive("r.json", b"1") is True
    assert store.create_exclusive("r.json", b"2") is False
    assert store.read("r.json") == b"1"


def test_nothing_temporary_is_left_or_listed(tmp_path):
    store = LocalStore(tmp_path)
    store.put_once("x/a", b"1")
    store.replace("x/a", b"2")
    store.create_exclusive("x/a", b"3")
    assert store.list(".") == ["x/a"]
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
def test_paths_cannot_leave_the_folder(tmp_path, path):
    with pytest.raises(JobInvalid, match="leave the output folder"):
        LocalStore(tmp_path / "out").put_once(path, b"")


def test_what_lies_in_a_folder_is_named_and_temporary_files_are_not(tmp_path):
    store = LocalStore(tmp_path)
    assert store.names(".") == store.names("nothing") == []
    store.put_once("x/a", b"1")
    store.put_once("b", b"2")
    assert store.names(".") == ["b", "x"]
    assert store.names("x") == ["a"]
    with pytest.raises(NotADirectoryError):
        store.names("b")


def test_a_stream_has_random_access_and_a_folder_is_its_own_local_copy(tmp_path):
    store = LocalStore(tmp_path)
    store.put_once("x/a", b"12345")
    with store.open("x/a") as stream:
        stream.seek(3)
        assert stream.read() == b"45"
    assert store.local_folder("x", {"a": "not looked at"}) == tmp_path / "x"


@pytest.mark.parametrize("name", ["new\nline", "sp ace", "ü", "back\\slash", "%41", "?#", "x" * 200], ids=ascii)
def test_odd_names_work(tmp_path, name):
    store = LocalStore(tmp_path / name)
    store.put_once(f"a/{name}", b"1")
    assert store.list(".") == [f"a/{name}"]
    assert store.read(f"a/{name}") == b"1"
    store.remove(f"a/{name}")
    assert store.list(".") == []


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(JobInvalid, match="NUL"):
        LocalStore(tmp_path).put_once("nul\0", b"")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("write", ["put_once", "create_exclusive"])
def test_a_file_system_without_hard_links_is_refused_with_the_way_out(tmp_path, monkeypatch, write, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputUnusable) as caught:
        getattr(LocalStore(tmp_path / "out"), write)("a/r.json", b"1")
    assert caught.value.exit_code == 2
    for said in ("makes no hard links", os.strerror(number), "a local disk or on NFS, or to s3://bucket/prefix"):
        assert said in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_alone_takes_no_link_is_named_with_its_own_reason(tmp_path, monkeypatch):
    link = os.link

    def refuse(source, target):
        if "/a/" in str(target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputUnusable, match=r"a/r\.json: cannot be written: Operation not permitted"):
        LocalStore(tmp_path).put_once("a/r.json", b"1")
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_full_disk_is_one_line_to_try_again_and_leaves_nothing_half():
    # /dev/full answers every write with ENOSPC, as a full disk does.
    script = """
import pathlib, sys, tempfile
from softshard.errors import StorageFull
from softshard.storage import LocalStore
import softshard.storage as storage
folder = tempfile.mkdtemp()
store = LocalStore(folder)
pathlib.Path(folder, ".tmp").mkdir()
real = pathlib.Path.open
def full(self, *args, **kwargs):
    return open("/dev/full", "wb") if ".tmp" in self.parts else real(self, *args, **kwargs)
pathlib.Path.open = full
try:
    store.put_once("part", b"x" * 100000)
except StorageFull as error:
    print(error.exit_code, "no space left" in str(error), store.exists("part"))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["75", "True", "False"]


def test_inputs_are_listed_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden.txt", "sub/c.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [
        os.path.relpath(file.uri.removeprefix("file://"), tmp_path) for file in list_inputs(str(tmp_path), source="s")
    ]
    assert names == ["a.txt", "b.txt", "sub/c.txt"]
    globbed = list_inputs(str(tmp_path / "*.txt"), source="s")
    assert [file.uri.rsplit("/", 1)[1] for file in globbed] == ["a.txt", "b.txt"]


def test_version_of_an_input_changes_with_its_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = list_inputs(str(file), source="s")[0].version
    file.write_text("three")
    assert list_inputs(str(file), source="s")[0].version != before


def test_missing_input_is_named(tmp_path):
    with pytest.raises(SourceUnreadable, match=r"nowhere.*source 'tales'"):
        list_inputs(str(tmp_path / "nowhere"), source="tales")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_inputs_are_decompressed_by_their_ending(tmp_path, ending):
    text = b"It rained. " * 1000
    packed = {"": text, ".gz": gzip.compress(text), ".zst": zstandard.ZstdCompressor().compress(text)}[ending]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed)
    with open_input(str(path)) as stream:
        assert stream.read() == text


def test_zst_of_several_frames_is_read_to_its_end(tmp_path):
    packer = zstandard.ZstdCompressor()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packer.compress(b"one ") + packer.compress(b"two"))
    with open_input(str(path)) as stream:
        assert stream.read() == b"one two"


def test_memory_file_system_is_an_input_too():
    import fsspec

    fsspec.filesystem("memory").pipe("/box/a.txt", b"hello")
    (file,) = list_inputs("memory://box", source="s")
    with open_input(file.uri) as stream:
        assert stream.read() == b"hello"


def zstd_frame(text, *, window_log, last=True):
    """A frame of one block that is stored as it is, as the format's RFC 8878 lays it out."""
    head = bytes.fromhex("28b52ffd") + bytes([0, (window_log - 10) << 3])
    return head + (len(text) << 3 | last).to_bytes(3, "little") + text


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zst_of_the_longest_window_is_read_to_its_end_and_no_truncated_one(tmp_path, window_log):
    path = tmp_path / "a.txt.zst"
    frame = zstd_frame(b"It rained. " * 9000, window_log=window_log)
    path.write_bytes(frame + zstd_frame(b"The end.", window_log=20))
    with open_input(str(path)) as stream:
        assert stream.read() == b"It rained. " * 9000 + b"The end."
    path.write_bytes(frame[:-3])
    with open_input(str(path)) as stream, pytest.raises((OSError, EOFError)):
        stream.read()


def test_version_of_a_link_is_that_of_the_file_it_leads_to(tmp_path):
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a.txt").symlink_to("b.txt")
    before = [file.version for file in list_inputs(str(tmp_path), source="s")]
    os.utime(tmp_path / "b.txt", (1, 1))
    after = [file.version for file in list_inputs(str(tmp_path), source="s")]
    assert before[0] == before[1] != after[0] == after[1]


def test_a_folder_that_cannot_be_opened_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("one")
    real = os.scandir

    def refuse(path):
        if str(path).endswith(("closed", "lost+found")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceUnreadable, match=r"cannot be listed: .*Permission denied: '.*closed'"):
        list_inputs(str(tmp_path), source="s")
    (tmp_path / "closed").rename(tmp_path / "lost+found")
    assert len(list_inputs(str(tmp_path), source="s")) == 1, "only root may open this one, on every disk"


def test_a_page_may_take_longer_to_read_than_the_library_allows_for_a_request(web, monkeypatch):  # noqa: F811
    """Documents are tokenised while a page is read, which may take hours."""
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    web.files["/a.txt"] = b"It rained."
    web.headers["/a.txt"] = {"Accept-Ranges": "none"}
    HTTPFileSystem.clear_instance_cache()
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1e-9))
    with open_input(f"{web.url}/a.txt") as stream:
        assert stream.read() == b"It rained."
