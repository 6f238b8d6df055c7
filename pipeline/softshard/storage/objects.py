"""A store in a bucket of an S3-compatible server.

Writes that must not overwrite carry the condition `If-None-Match: *`, which the server enforces among all writers.
Before the first such write, a probe checks that the server does, and a server that does not is refused. Each object has
a random token of its write in its metadata. With it, a writer whose reply was lost can tell its own object from
another's, and exactly one of many writers learns that it created the object, even when all write the same bytes.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from softshard.errors import JobInvalid, PartConflict, StoreUnusable
from softshard.records.digest import sha256_hex, sha256_of_file, sha256_of_stream
from softshard.storage.copies import copy_folder
from softshard.storage.object_reader import open_object
from softshard.storage.s3 import S3, ConditionFailed, RetryPolicy, TransientFailure, UnsupportedRequest
from softshard.storage.store import confined
from softshard.storage.uploads import Content, FileContent, read_write_token, send

__all__ = ["ObjectStore"]

_PROBE = ".probe-"
_PART_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**18
_HASHED_BYTES = 8 * 2**20
_CONTROL = re.compile("[\\x00-\\x1f\\x7f]")
"""Servers treat these characters in a key differently."""


class ObjectStore:
    """A `Store` in a bucket.

    Args:
        uri: `s3://bucket/prefix`.
        retry: how often and how long a failing server is tried.
        part_bytes: a larger object is sent in parts of this size, at least 5 MiB for most servers.
        keys_per_page: largest number of keys in one page of a listing.
    """

    def __init__(
        self,
        uri: str,
        *,
        retry: RetryPolicy | None = None,
        part_bytes: int = _PART_BYTES,
        keys_per_page: int = 1000,
    ) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self._bucket, self._prefix = bucket, confined(prefix.strip("/"), uri=uri)
        self._options: dict[str, Any] = {
            "retry": retry or RetryPolicy(),
            "part_bytes": part_bytes,
            "keys_per_page": keys_per_page,
        }
        self._part_bytes, self._keys_per_page = part_bytes, keys_per_page
        self._s3 = S3(uri=self.uri, retry=self._options["retry"])

    @property
    def uri(self) -> str:
        """Bucket and prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def below(self, path: str) -> ObjectStore:
        """The store of a folder inside this one."""
        return ObjectStore(f"s3://{self._bucket}/{self._key(path)}", **self._options)

    def put_once(self, path: str, content: bytes) -> None:
        """Write a new object whole; adopt an equal one.

        Raises:
            PartConflict: another object is there.
            StorageFull, StoreUnavailable, StoreUnusable.
        """
        if not self.create_exclusive(path, content):
            self._check_equal(path, sha256_hex(content))

    def put_file_once(self, path: str, file: Path) -> None:
        """`put_once` of a local file's content, with one upload part in memory at a time."""
        if not self._create(path, FileContent(file)):
            self._check_equal(path, sha256_of_file(file))

    def _check_equal(self, path: str, expected: str) -> None:
        with self._open(path, block_bytes=_HASHED_BYTES) as stream:
            actual = sha256_of_stream(stream)
        if actual != expected:
            raise PartConflict(uri=self._uri_at(path), expected=expected, actual=actual)

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; False if one exists, unless this call created it and only the reply was lost."""
        return self._create(path, Content(content))

    def _create(self, path: str, content: Content) -> bool:
        self._check_conditional_writes()
        return self._create_on_condition(self._key(path), content, about=path)

    def _create_on_condition(self, key: str, content: Content, *, about: str) -> bool:
        token = uuid.uuid4().hex
        is_first = True

        def attempt() -> bool:
            nonlocal is_first
            # An attempt without an answer may have succeeded, and looking is cheaper than sending all of it again. The
            # token is needed all the same: aiohttp itself repeats a PUT when a kept connection was cut.
            if not is_first and (there := self._read_token(key, about)) is not None:
                return there == token
            is_first = False
            try:
                self._send(key, content, about=about, token=token, is_new=True)
            except ConditionFailed:
                there = self._read_token(key, about)
                if there is None:
                    raise TransientFailure("the object that was in the way is gone") from None
                return there == token
            return True

        return self._s3.call_with_retries(attempt, about=about)

    def _read_token(self, key: str, about: str) -> str | None:
        return read_write_token(self._s3, {"Bucket": self._bucket, "Key": key, "about": about})

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole in place of what is there."""
        key, token = self._key(path), uuid.uuid4().hex
        whole = Content(content)
        self._s3.call_with_retries(lambda: self._send(key, whole, about=path, token=token, is_new=False), about=path)

    def _send(self, key: str, content: Content, *, about: str, token: str, is_new: bool) -> None:
        place = {"Bucket": self._bucket, "Key": key, "about": about}
        send(self._s3, content, place=place, token=token, is_new=is_new, part_bytes=self._part_bytes)

    def _check_conditional_writes(self) -> None:
        """Check, once per process and bucket, that the server refuses a second object of one name.

        Raises:
            StoreUnusable: the server overwrites it.
        """
        if self._bucket in self._s3.conditional:
            return
        name = f"{_PROBE}{uuid.uuid4().hex}"
        key = self._key(name)
        try:
            self._create_on_condition(key, Content(b"1"), about=name)
            keeps = not self._create_on_condition(key, Content(b"2"), about=name)
            self.remove(name)
        except UnsupportedRequest:
            keeps = False
        if not keeps:
            problem = (
                "the server ignores `If-None-Match: *`, so two workers could overwrite each other's parts; use a store"
                " with conditional writes, or a local folder"
            )
            raise StoreUnusable(uri=self.uri, problem=problem)
        self._s3.conditional.add(self._bucket)

    def read(self, path: str) -> bytes:
        """Content of an object."""
        content: bytes = self._s3.call("get_object", about=path, Bucket=self._bucket, Key=self._key(path))["Content"]
        return content

    def open(self, path: str) -> BinaryIO:
        """An object as a stream with random access, fetched in blocks of 256 KiB or more."""
        return self._open(path, block_bytes=_BLOCK_BYTES)

    def _open(self, path: str, *, block_bytes: int) -> BinaryIO:
        return open_object(self._s3, bucket=self._bucket, key=self._key(path), about=path, block_bytes=block_bytes)

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Bytes of an object."""
        head = self._s3.call("head_object", about=path, Bucket=self._bucket, Key=self._key(path))
        return int(head["ContentLength"])

    def names(self, prefix: str) -> list[str]:
        """Names of the objects and folders directly in a folder, sorted; empty when there is no such folder."""
        found: set[str] = set()
        for page in self._pages(prefix, Delimiter="/"):
            keys = [item["Key"] for item in page.get("Contents", ())]
            keys += [item["Prefix"].removesuffix("/") for item in page.get("CommonPrefixes", ())]
            found |= {key.rsplit("/", 1)[-1] for key in keys if _is_valid_path(self._path(key))}
        return sorted(found)

    def list(self, prefix: str) -> list[str]:
        """Paths of the objects below a folder, sorted; keys that are no valid path are left out."""
        found = []
        for page in self._pages(prefix):
            found += [self._path(item["Key"]) for item in page.get("Contents", ())]
        return sorted(path for path in found if _is_valid_path(path))

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        folder = self._key(prefix)
        return self._s3.pages(
            bucket=self._bucket,
            prefix=f"{folder}/" if folder else "",
            about=prefix,
            keys_per_page=self._keys_per_page,
            **options,
        )

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._s3.call("delete_object", about=path, Bucket=self._bucket, Key=self._key(path))

    def local_folder(self, path: str, files: Mapping[str, str]) -> Path:
        """A copy in the user's cache; see `Store.local_folder`."""
        folder = self.below(path)
        return copy_folder(folder.read, files, uri=folder.uri)

    def _key(self, path: str) -> str:
        """Key of a path. Raises JobInvalid for a path that would leave the store or that cannot be a key."""
        inside = confined(path, uri=self.uri)
        key = "/".join(part for part in (self._prefix, inside) if part)
        try:
            num_bytes = len(key.encode())
        except UnicodeEncodeError:
            raise JobInvalid(file=self.uri, place=ascii(path), problem="this path is not Unicode") from None
        if num_bytes > 1024:
            raise JobInvalid(file=self.uri, place=ascii(path), problem="this path makes a key of over 1024 bytes")
        if _CONTROL.search(key):
            raise JobInvalid(file=self.uri, place=ascii(path), problem="this path holds a control character")
        return key

    def _path(self, key: str) -> str:
        return key[len(self._prefix) + 1 :] if self._prefix else key

    def _uri_at(self, path: str) -> str:
        return f"{self.uri}/{path}"


def _is_valid_path(path: str) -> bool:
    """Whether `confined` leaves a path unchanged, and it is not a probe of `_check_conditional_writes`."""
    parts = path.split("/")
    return not (_CONTROL.search(path) or any(part in {"", ".", ".."} or part.startswith(_PROBE) for part in parts))
