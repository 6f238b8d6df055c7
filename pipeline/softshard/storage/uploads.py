"""Uploads whole objects: small ones in one request, large ones in parts that become visible together.

The token of the write is stored in the object's metadata. Each request carries digests for the server to compare, and
the digest that the server returns is compared again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from pathlib import Path

from softshard.errors import SoftshardError
from softshard.storage.s3 import S3, ConditionFailed, TransientFailure

__all__ = ["Content", "FileContent", "read_write_token", "send"]

_TOKEN = "softshard-write"  # noqa: S105 - a name in the metadata, and no secret
_MOST_PARTS = 10_000


class Content:
    """Bytes to upload, which are read again for every attempt."""

    def __init__(self, content: bytes) -> None:
        self._content, self.size = content, len(content)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`."""
        return self._content[start:stop]


class FileContent(Content):
    """The content of a local file, read one upload part at a time."""

    def __init__(self, file: Path) -> None:
        self._file, self.size = file, file.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`."""
        with self._file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


def read_write_token(s3: S3, place: dict[str, str]) -> str | None:
    """Token of the write that created an object: empty without one, None without an object. Errors: `S3.call_once`."""
    try:
        head = s3.call_once("head_object", **place)
    except FileNotFoundError:
        return None
    return str(head.get("Metadata", {}).get(_TOKEN, ""))


def send(s3: S3, content: Content, *, place: dict[str, str], token: str, is_new: bool, part_bytes: int) -> None:
    """Upload an object, without a retry of the whole.

    Args:
        place: `Bucket`, `Key`, and `about`, the object's name for errors.
        token: of this write.
        is_new: upload on the condition that the object does not exist.
        part_bytes: a larger object is uploaded in parts of this size.

    Raises:
        ConditionFailed: with `is_new`, the object exists.
        TransientFailure, UnsupportedRequest, StorageFull, StoreUnusable: as `S3.call_once`.
        StoreUnavailable: a part failed in all attempts.
    """
    condition = {"IfNoneMatch": "*"} if is_new else {}
    if content.size > part_bytes:
        _send_in_parts(s3, content, place=place, condition=condition, token=token, part_bytes=part_bytes)
        return
    body = content.read(0, content.size)
    # Both are plain headers: a server that ignores one of them checks the other.
    digests = {"ContentMD5": _md5(body), "ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode()}
    sent = s3.call_once("put_object", Body=body, Metadata={_TOKEN: token}, **digests, **condition, **place)
    _check_received(s3, sent.get("ETag", ""), body, place)


def _check_received(s3: S3, etag: str, body: bytes, place: dict[str, str]) -> None:
    """Delete an object that differs from what was sent, for servers that check no digest. Raises TransientFailure.

    Most servers return the MD5 of the stored bytes as the ETag; where it is something else, the object is read back.
    """
    if etag.strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest():
        return
    if s3.call_once("get_object", **place)["Content"] != body:
        s3.call_once("delete_object", **place)
        raise TransientFailure("the server holds other bytes than were sent")


def _send_in_parts(
    s3: S3, content: Content, *, place: dict[str, str], condition: dict[str, str], token: str, part_bytes: int
) -> None:
    """Upload a large object; each part has retries, and the condition is checked for the whole object."""
    if condition and read_write_token(s3, place) is not None:
        raise ConditionFailed
    size = max(part_bytes, -(-content.size // _MOST_PARTS))
    upload = s3.call("create_multipart_upload", Metadata={_TOKEN: token}, **place)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, content.size, size), start=1):
            body = content.read(start, min(start + size, content.size))
            sent = s3.call("upload_part", UploadId=upload, PartNumber=number, Body=body, ContentMD5=_md5(body), **place)
            parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        s3.call_once(
            "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts}, **condition, **place
        )
    except BaseException:
        # An unfinished upload is stored and charged for; where this fails too, a rule of the bucket can remove it.
        with contextlib.suppress(SoftshardError, TransientFailure, FileNotFoundError):
            s3.call_once("abort_multipart_upload", UploadId=upload, **place)
        raise


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
