"""Lists the files of a source and opens each as a stream, decompressed while it is read.

Any fsspec file system can be read. Objects of an S3-compatible server are read with the same client as outputs:
requests have a retry policy, and an object that changes while it is read is an error.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from softshard.errors import SourceUnreadable
from softshard.records.digest import sha256_of_stream
from softshard.storage.object_reader import open_object
from softshard.storage.outages import find_outage, network_errors, source_failure
from softshard.storage.s3 import S3, RetryPolicy

__all__ = ["InputFile", "content_version", "list_inputs", "open_input"]

_BLOCK_BYTES = 4 * 2**20
_UNPACKED_BYTES = 2**18

# What file systems tell of a file, by lower-case name without punctuation. A time of creation may stay when a file is
# written again, and is used where there is nothing else.
_CONTENT_KEYS = (
    *("etag", "contentmd5", "digest", "md5hash", "md5", "crc32c", "crc", "sha256", "sha", "hex", "checksum"),
    *("blobid", "contenthash", "generation", "versionid"),
)
_CHANGE_KEYS = (
    *("mtime", "lastmodified", "modified", "updated", "modify", "modificationtime", "lastwritetime", "datetime"),
    *("clientmodified", "servermodified"),
)
_CREATION_KEYS = ("created", "creationtime", "timecreated")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of a source."""

    uri: str
    size: int | None
    version: str | None
    """Changes with the content: the size, with the digests, ids and times that the file system has of the file. None:
    it has none, and only the content tells (`content_version`)."""


def list_inputs(uri: str, *, source: str) -> list[InputFile]:
    """List the files of a file, folder, glob or fsspec URI, sorted by name.

    Folders are listed with all folders below them; hidden files are left out.

    Raises:
        SourceUnreadable: nothing is there, or the file system refuses the request.
        SourceUnavailable: the file system cannot be reached for now.
        ExtraMissing: the file system's package is not installed.
        StoreUnavailable, StoreUnusable: an object store cannot be reached, or refuses the request.
    """
    import fsspec

    if uri.startswith("s3://"):
        files = _list_objects(uri)
    else:
        try:
            fs, path = fsspec.core.url_to_fs(uri)
            if fs.isdir(path):
                found = fs.find(path)
            elif fs.exists(path):
                found = [path]
            else:
                found = [name for name in fs.glob(path) if not fs.isdir(name)]
            root = path.rstrip("/")
            files = [_describe(fs, name) for name in sorted(found) if not _is_hidden(name, root)]
            if not files:
                # `exists` and `isdir` of several file systems take a server that is away for a file that is not there.
                _ask_why(fs, path)
        except network_errors(OSError, ImportError, ValueError) as error:
            raise source_failure(error, source=source, uri=uri, problem="cannot be listed") from error
    if not files:
        raise SourceUnreadable(source=source, uri=uri, problem="no such file or folder, or nothing in it")
    return files


def _list_objects(uri: str) -> list[InputFile]:
    """Objects of an S3 URI: the object of that key, else those below it, else those that match it as a glob."""
    from fsspec.utils import glob_translate

    s3, bucket, key = _open_bucket(uri)
    if key and not key.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            head = s3.call("head_object", about=key, Bucket=bucket, Key=key)
            return [_object(bucket, key, size=head["ContentLength"], etag=head["ETag"])]
    root = key.rstrip("/")
    found = _objects_below(s3, bucket, f"{root}/" if root else "")
    if not found and (magic := re.search(r"[*?[]", key)):
        matches = re.compile(glob_translate(key)).match
        found = _objects_below(s3, bucket, key[: key.rfind("/", 0, magic.start()) + 1])
        found = {name: item for name, item in found.items() if matches(name)}
    return [
        _object(bucket, name, size=item["Size"], etag=item["ETag"])
        for name, item in sorted(found.items())
        if not _is_hidden(name, root)
    ]


def _objects_below(s3: S3, bucket: str, prefix: str) -> dict[str, Any]:
    """Entries of a listing by key; keys that end in a slash are markers of folders and are left out."""
    pages = s3.pages(bucket=bucket, prefix=prefix, about=prefix)
    return {item["Key"]: item for page in pages for item in page.get("Contents", ()) if not item["Key"].endswith("/")}


def _object(bucket: str, key: str, *, size: int, etag: str) -> InputFile:
    return InputFile(uri=f"s3://{bucket}/{key}", size=size, version=f"{size}-{etag}")


def _open_bucket(uri: str) -> tuple[S3, str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return S3(uri=f"s3://{bucket}", retry=RetryPolicy()), bucket, key


def _is_hidden(name: str, root: str) -> bool:
    inside = name[len(root) :] if name.startswith(root) else name.rsplit("/", 1)[-1]
    return any(part.startswith(".") for part in inside.split("/") if part)


def _ask_why(fs: Any, path: str) -> None:
    """Raise what the file system raises for a path that is not there if that is an outage."""
    try:
        fs.info(path)
    except network_errors(OSError, ValueError) as error:
        if find_outage(error) is not None:
            raise


def _describe(fs: Any, name: str) -> InputFile:
    info = fs.info(name)
    size = info.get("size")
    known = {re.sub("[^a-z0-9]", "", key.lower()): value for key, value in info.items() if value}
    found = [f"{key}={known[key]}" for key in (*_CONTENT_KEYS, *_CHANGE_KEYS) if key in known]
    found = found or [f"{key}={known[key]}" for key in _CREATION_KEYS if key in known]
    version = f"{size}-{','.join(found)}" if found else None
    return InputFile(uri=fs.unstrip_protocol(name), size=size, version=version)


def content_version(uri: str) -> str:
    """Version of a file from its content alone; the whole file is read."""
    with _open_raw(uri) as raw:
        return f"sha256={sha256_of_stream(raw)}"


@contextlib.contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """Open a file as a stream of bytes, decompressed by its ending (.zst, .gz); memory does not grow with its size."""
    with _open_raw(uri) as raw:
        if uri.endswith(".zst"):
            import pyarrow as pa

            # zstandard's own reader takes a truncated file for a complete one; pyarrow's raises an error.
            with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
                yield io.BufferedReader(stream, _UNPACKED_BYTES)
        elif uri.endswith(".gz"):
            import gzip

            with gzip.open(raw, "rb") as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield raw


@contextlib.contextmanager
def _open_raw(uri: str) -> Iterator[BinaryIO]:
    if uri.startswith("s3://"):
        s3, bucket, key = _open_bucket(uri)
        with open_object(s3, bucket=bucket, key=key, about=key, block_bytes=_BLOCK_BYTES) as stream:
            yield stream
        return
    import fsspec

    with fsspec.open(uri, mode="rb") as raw:
        yield raw
