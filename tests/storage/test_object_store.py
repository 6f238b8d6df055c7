"""What a store in a bucket promises, on a real server that is slow, overloaded, cut off, or careless."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
import sys
import traceback

import pytest

from fakes.s3_server import (
    ACCESS_KEY,
    SECRET_KEY,
    cut_reply,
    cut_upload,
    damage_upload,
    ignore_condition,
    lose_reply,
    make_bucket,
    moto,  # noqa: F401
    proxy,  # noqa: F401
    refuse,
    slow_down,
    spoiled_server,  # noqa: F401
    wait,
)
from softshard.errors import (
    EXIT_JOB,
    EXIT_TRY_AGAIN,
    ExtraMissing,
    JobInvalid,
    PartConflict,
    PartCorrupt,
    StorageFull,
    StoreUnavailable,
    StoreUnusable,
)
from softshard.records.digest import sha256_hex
from softshard.storage import LocalStore, ObjectStore, RetryPolicy, open_store

QUICK = RetryPolicy(attempts=5, first_pause_seconds=0.01, read_timeout_seconds=20.0)
MIB = 2**20


@pytest.fixture
def store(proxy, request):  # noqa: F811
    """A store that has seen that its server keeps conditions, so that only what a test does is counted."""
    made = ObjectStore(f"s3://box/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}", retry=QUICK)
    assert made.create_exclusive("first", b"")
    made.remove("first")
    proxy.seen.clear()
    return made


def test_put_once_adopts_equal_bytes_and_refuses_others(store):
    store.put_once("a/b.bin", b"one")
    store.put_once("a/b.bin", b"one")
    with pytest.raises(PartConflict, match="nothing was overwritten"):
        store.put_once("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"one"


def test_only_one_creation_is_told_that_it_was_first_be_the_content_equal_or_not(store):
    assert store.create_exclusive("receipt", b"1") is True
    assert store.create_exclusive("receipt", b"1") is False
    assert store.create_exclusive("receipt", b"2") is False
    assert store.read("receipt") == b"1"


def test_objects_are_read_measured_replaced_and_removed(store):
    store.replace("pointer", b"one")
    store.replace("pointer", b"three")
    assert (store.read("pointer"), store.size("pointer"), store.exists("pointer")) == (b"three", 5, True)
    store.remove("pointer")
    store.remove("pointer")
    assert not store.exists("pointer")
    for look in (store.read, store.size, store.open):
        with pytest.raises(FileNotFoundError, match="pointer"):
            look("pointer")


PASSING = {
    "503": slow_down,
    "500": refuse("InternalError", 500),
    "409": refuse("ConditionalRequestConflict", 409),
    "timeout": refuse("RequestTimeout", 400),
    "damaged": refuse("BadDigest", 400),
    "cut upload": cut_upload,
    "lost reply": lose_reply,
    "careless server": damage_upload,
}


@pytest.mark.parametrize("failure", PASSING)
@pytest.mark.parametrize("write", ["put_once", "create_exclusive", "replace"])
def test_a_write_that_fails_twice_in_passing_succeeds(store, proxy, write, failure):  # noqa: F811
    content = os.urandom(100_000)
    proxy.spoil(PASSING[failure], "PUT", times=2)
    assert getattr(store, write)("object", content) in {None, True}
    assert store.read("object") == content
    assert proxy.spoiled >= 1


def test_a_creation_whose_reply_was_lost_is_ones_own(store, proxy):  # noqa: F811
    proxy.spoil(lose_reply, "PUT")
    assert store.create_exclusive("receipt", b"1") is True
    assert proxy.spoiled == 1
    assert store.create_exclusive("receipt", b"1") is False


def test_a_refusal_whose_reply_was_lost_is_still_a_refusal_though_the_bytes_are_equal(store, proxy):  # noqa: F811
    assert ObjectStore(store.uri, retry=QUICK).create_exclusive("receipt", b"1")
    proxy.spoil(lose_reply, "PUT")
    assert store.create_exclusive("receipt", b"1") is False


def test_what_was_in_the_way_and_is_gone_is_created_anew(store, proxy):  # noqa: F811
    proxy.spoil(refuse("PreconditionFailed", 412), "PUT")
    assert store.create_exclusive("receipt", b"1") is True


@pytest.mark.parametrize("failure", [slow_down, refuse("InternalError", 500), cut_reply, lose_reply])
def test_a_read_that_fails_twice_in_passing_gives_the_whole_object(store, proxy, failure):  # noqa: F811
    content = os.urandom(100_000)
    store.put_once("object", content)
    proxy.spoil(failure, "GET", times=2)
    assert store.read("object") == content
    proxy.spoil(failure, "HEAD", times=2)
    assert store.size("object") == len(content)
    proxy.spoil(failure, "GET", having="list-type", times=2)
    assert store.list(".") == ["object"]


def test_a_server_that_is_silent_is_asked_again(store, proxy):  # noqa: F811
    hasty = ObjectStore(store.uri, retry=RetryPolicy(attempts=8, first_pause_seconds=0.01, read_timeout_seconds=1.0))
    store.put_once("object", b"1")
    proxy.spoil(wait(3.0), "GET")
    assert hasty.read("object") == b"1"
    proxy.spoil(wait(3.0), "PUT")
    assert hasty.create_exclusive("other", b"2") is True, "the first request arrives after the second"


def test_a_server_that_stays_overloaded_ends_in_one_line_to_try_again(store, proxy):  # noqa: F811
    proxy.spoil(slow_down, "PUT", "HEAD", times=100)
    with pytest.raises(StoreUnavailable) as caught:
        store.replace("object", b"1")
    assert caught.value.exit_code == EXIT_TRY_AGAIN
    assert str(caught.value).startswith(f"{store.uri}/object: the object store does not answer (SlowDown, 5 attempts)")
    assert proxy.count("PUT") == QUICK.attempts


def test_no_server_at_all_ends_in_one_line_to_try_again(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="EndpointConnectionError, 5 attempts"):
        store.read("object")


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (refuse("AccessDenied", 403), StoreUnusable, "check the credentials in the environment"),
        (refuse("SignatureDoesNotMatch", 403), StoreUnusable, "check AWS_SECRET_ACCESS_KEY"),
        (refuse("NoSuchBucket", 404), StoreUnusable, "there is no such bucket"),
        (refuse("EntityTooLarge", 400), StoreUnusable, "EntityTooLarge"),
        (refuse("XMinioStorageFull", 507), StorageFull, "no space left"),
    ],
)
def test_what_cannot_pass_is_said_at_once(store, proxy, answer, error, says):  # noqa: F811
    proxy.spoil(answer, "PUT")
    with pytest.raises(error, match=says):
        store.replace("object", b"1")
    assert proxy.count("PUT") == 1


def test_a_bucket_that_is_not_there_is_named(proxy):  # noqa: F811
    with pytest.raises(StoreUnusable, match=r"s3://nowhere/run/object.*no such bucket"):
        ObjectStore("s3://nowhere/run", retry=QUICK).replace("object", b"1")


@pytest.mark.parametrize("answer", [ignore_condition, refuse("NotImplemented", 501)])
def test_a_server_that_ignores_the_condition_is_refused_before_anything_is_written(proxy, answer):  # noqa: F811
    make_bucket("careless")
    careless = ObjectStore("s3://careless/run", retry=QUICK)
    proxy.spoil(answer, "PUT", times=100)
    for write in (careless.put_once, careless.create_exclusive):
        with pytest.raises(StoreUnusable, match="ignores `If-None-Match") as caught:
            write("receipt", b"1")
        assert caught.value.exit_code == EXIT_JOB
    proxy.seen.clear()
    everything = list(ObjectStore("s3://careless", retry=QUICK)._s3.pages(bucket="careless", prefix="", about=""))
    assert [page.get("Contents") for page in everything] == [None], "no probe is left"


def test_a_server_is_probed_once_by_a_process(proxy):  # noqa: F811
    make_bucket("probed")
    proxy.seen.clear()
    for name in ("one", "two", "three"):
        ObjectStore(f"s3://probed/{name}", retry=QUICK).create_exclusive("receipt", b"1")
    assert proxy.count("PUT", having=".probe-") == 2
    assert proxy.count("DELETE", having=".probe-") == 1


def test_listings_go_on_over_pages_in_order_and_stay_in_the_folder(store):
    pages = ObjectStore(store.uri, retry=QUICK, keys_per_page=2)
    paths = [f"a/{n}" for n in range(5)] + ["a/sub/6", "ab/7", "b"]
    for path in paths:
        store.replace(path, b"")
    assert pages.list("a") == paths[:6]
    assert pages.list(".") == sorted(paths)
    assert pages.below("a").list("sub") == ["sub/6"]
    assert pages.list("nothing") == pages.names("nothing") == []
    assert pages.names(".") == ["a", "ab", "b"]
    assert pages.names("a") == ["0", "1", "2", "3", "4", "sub"]


ODD = [
    "sp ace",
    "a+b%25#?x=1&y",
    "ü/日本",
    "back\\slash",
    "quote'\"<>&",
    "st*r[1]",
    ".hidden",
    "~",
    "trailing ",
    "x" * 900,
]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names_work(store, name):
    store.put_once(f"odd/{name}", b"1")
    assert store.list("odd") == [f"odd/{name}"]
    assert store.read(f"odd/{name}") == b"1"
    store.remove(f"odd/{name}")
    assert store.list("odd") == []


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "\x7f", "nul\0", "half \ud800", "x" * 1100], ids=ascii)
def test_names_that_a_key_cannot_have_are_refused_on_one_line(store, proxy, name):  # noqa: F811
    with pytest.raises(JobInvalid) as caught:
        store.put_once(name, b"1")
    assert "\n" not in str(caught.value)
    assert proxy.seen == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a/..", ".."])
def test_paths_cannot_leave_the_store(store, tmp_path, path):
    for one in (store, LocalStore(tmp_path / "out")):
        for use in (one.read, one.remove, one.below, one.open, lambda path, one=one: one.replace(path, b"")):
            with pytest.raises(JobInvalid, match="leave the output folder"):
                use(path)


def test_a_large_file_is_sent_in_parts_and_only_what_did_not_arrive_is_sent_again(store, proxy, tmp_path):  # noqa: F811
    large = ObjectStore(store.uri, retry=QUICK, part_bytes=5 * MIB)
    file = tmp_path / "large"
    file.write_bytes(os.urandom(12 * MIB))
    proxy.spoil(cut_upload, "PUT", having="partNumber=2")
    proxy.spoil(slow_down, "PUT", having="partNumber=3")
    large.put_file_once("large", file)
    sent = [proxy.count("PUT", having=f"partNumber={n}") for n in (1, 2, 3)]
    assert sent == [1, 2, 2]
    assert large.read("large") == file.read_bytes()
    large.put_file_once("large", file)
    assert [proxy.count("PUT", having=f"partNumber={n}") for n in (1, 2, 3)] == sent, "equal bytes are adopted, unsent"
    file.write_bytes(os.urandom(12 * MIB))
    with pytest.raises(PartConflict):
        large.put_file_once("large", file)


@pytest.mark.parametrize("failure", [lose_reply, slow_down, refuse("ConditionalRequestConflict", 409)])
def test_a_large_object_is_there_once_whole_whatever_becomes_of_its_completion(store, proxy, failure):  # noqa: F811
    large = ObjectStore(store.uri, retry=QUICK, part_bytes=5 * MIB)
    content = os.urandom(6 * MIB)
    proxy.spoil(failure, "POST", having="uploadId")
    assert large.create_exclusive("large", content) is True
    assert large.read("large") == content
    assert large.create_exclusive("large", content) is False
    assert "Uploads" not in store._s3.call("list_multipart_uploads", Bucket="box"), "nothing is left that is paid for"


def test_a_stream_fetches_what_is_read_from_one_version(store, proxy):  # noqa: F811
    content = os.urandom(2 * MIB)
    store.put_once("part", content)
    proxy.seen.clear()
    with store.open("part") as stream:
        stream.seek(-1000, os.SEEK_END)
        assert stream.read() == content[-1000:]
        stream.seek(10)
        assert stream.read(20) == content[10:30]
        ranges = [request.headers["range"] for request in proxy.seen if request.method == "GET"]
        assert sum(int(stop) - int(start) for start, stop in (r[6:].split("-") for r in ranges)) < MIB
        store.replace("part", content)
        assert stream.read(2**19) is not None, "the same bytes are the same version"
        store.replace("part", content[::-1])
        stream.seek(MIB)
        with pytest.raises(OSError, match="replaced while it was read"):
            stream.read(2**19)


def test_a_local_copy_is_made_once_and_anew_when_it_is_damaged(store, proxy):  # noqa: F811
    store.put_once("fold/weights", b"12345")
    files = {"weights": sha256_hex(b"12345")}
    folder = store.local_folder("fold", files)
    assert (folder / "weights").read_bytes() == b"12345"
    reads = proxy.count("GET")
    assert store.local_folder("fold", files) == folder
    assert proxy.count("GET") == reads
    (folder / "weights").write_bytes(b"12")
    assert (store.local_folder("fold", files) / "weights").read_bytes() == b"12345"


def test_no_local_copy_is_left_of_files_that_are_not_what_they_should_be(store, tmp_path):
    store.put_once("fold/weights", b"12345")
    with pytest.raises(PartCorrupt, match=f"{store.uri}/fold/weights"):
        store.local_folder("fold", {"weights": sha256_hex(b"other")})
    with pytest.raises(FileNotFoundError):
        store.local_folder("fold", {"weights": sha256_hex(b"12345"), "config": sha256_hex(b"")})
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def race(uri: str, who: int, rounds: int) -> list[list[bool]]:
    """By round, what eight threads of one process were told."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        created = []
        for number in range(rounds):
            stores = [ObjectStore(uri, retry=RetryPolicy(attempts=12, first_pause_seconds=0.01)) for _ in range(8)]
            content = [b"equal" if number % 2 else f"{who} {thread}".encode() for thread in range(8)]
            path = f"receipts/{number}"
            created.append(
                list(
                    pool.map(
                        lambda pair, path=path: pair[0].create_exclusive(path, pair[1]),
                        zip(stores, content, strict=True),
                    )
                )
            )
        return created


def test_of_many_processes_and_threads_exactly_one_creates_whatever_replies_are_lost(store, proxy):  # noqa: F811
    rounds, processes = 12, 2
    proxy.spoil(lose_reply, "PUT", having="receipts", times=30)
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        told = list(pool.map(race, [store.uri] * processes, range(processes), [rounds] * processes))
    assert [sum(sum(one[number]) for one in told) for number in range(rounds)] == [1] * rounds
    assert proxy.spoiled == 30


def said_by(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error.__dict__) + repr(error.args)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"AWS_ENDPOINT_URL": "http://someone:hunter2hunter2@127.0.0.1:1"},
        {"AWS_ENDPOINT_URL": "no address hunter2hunter2"},
        {"AWS_SECRET_ACCESS_KEY": "hunter2hunter2\nmore"},
        {"AWS_ACCESS_KEY_ID": "hunter2hunter2\r\nmore"},
        {"AWS_SESSION_TOKEN": "hunter2hunter2\nmore"},
        {"AWS_PROFILE": "hunter2hunter2"},
        {"HTTP_PROXY": "http://someone:hunter2hunter2@127.0.0.1:1"},
    ],
    ids=lambda environment: ",".join(environment) or "echo",
)
def test_no_error_holds_a_credential_whatever_a_library_or_the_server_says(store, proxy, monkeypatch, environment):  # noqa: F811
    # The server quotes the request's signature and the secret key itself.
    proxy.spoil(refuse("AccessDenied", 403), "PUT", "GET", "HEAD", times=100)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    failed = 0
    for use in (store.read, store.list, store.exists, lambda path: store.put_once(path, b"1")):
        with contextlib.suppress(FileNotFoundError):
            with pytest.raises((StoreUnusable, StoreUnavailable)) as caught:
                use("object")
            failed += 1
            assert not [word for word in (SECRET_KEY, ACCESS_KEY, "hunter2") if word in said_by(caught.value)]
    assert failed == 4


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@box/run",
        "s3://hunter2@box/run",
        "https://someone:hunter2@example.org/run",
        "https://example.org/run?X-Amz-Signature=hunter2",
    ],
)
def test_a_uri_with_a_credential_is_refused_without_repeating_it(uri):
    with pytest.raises(JobInvalid) as caught:
        open_store(uri)
    assert "holds a credential" in str(caught.value)
    assert "hunter2" not in said_by(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///run", "s3://a", "gs://box/run", "https://example.org/run"])
def test_what_is_no_store_is_refused(uri):
    with pytest.raises(JobInvalid, match="bucket"):
        open_store(uri)


def test_a_store_is_opened_by_its_uri(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)
    remote = open_store("s3://box/runs/x/")
    assert isinstance(remote, ObjectStore)
    assert (remote.uri, remote.below("targets").uri) == ("s3://box/runs/x", "s3://box/runs/x/targets")
    assert open_store("s3://box").below("targets").uri == "s3://box/targets"


def test_without_s3fs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of no connection that is kept")
    with pytest.raises(ExtraMissing, match=r"install softshard\[s3\]") as caught:
        open_store("s3://box/run").read("object")
    assert caught.value.exit_code == EXIT_JOB
