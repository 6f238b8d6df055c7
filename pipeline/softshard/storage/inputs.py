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
from softshard.storage.object_reader import open_object
from softshard.storage.s3 import S3, RetryPolicy
from softshard.telemetry.redaction import without_credentials

__all__ = ["InputFile", "list_inputs", "open_input"]

_BLOCK_BYTES = 4 * 2**20
_UNPACKED_BYTES = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of a source. `version` changes with its content: it is the size and the time of change, or the ETag."""

    uri: str
    size: int | None
    version: str


def list_inputs(uri: str, *, source: str) -> list[InputFile]:
    """List the files of a file, folder, glob or fsspec URI, sorted by name.

    Folders are listed with all folders below them; hidden files are left out.

    Raises:
        SourceUnreadable: nothing is there, or the file system cannot be reached.
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
        except (OSError, ImportError, ValueError) as error:
            problem = f"cannot be listed: {without_credentials(str(error))}"
            raise SourceUnreadable(source=source, uri=uri, problem=problem) from error
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


def _describe(fs: Any, name: str) -> InputFile:
    info = fs.info(name)
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return InputFile(uri=fs.unstrip_protocol(name), size=info.get("size"), version=f"{info.get('size')}-{version}")


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
