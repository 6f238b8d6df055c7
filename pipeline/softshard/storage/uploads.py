"""Objects sent whole: small ones in one request, large ones in parts that become visible together.

In: bytes or a file, and the token of the write, which is kept in the object's metadata. Out: the object, as it was
sent: each request carries digests that the server compares, and what a server says that it holds is compared again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from pathlib import Path

from softshard.errors import SoftshardError
from softshard.storage.s3 import S3, Passing, Taken

__all__ = ["Content", "FileContent", "send", "write_token"]

_TOKEN = "softshard-write"  # noqa: S105 - a name in the metadata, and no secret
_MOST_PARTS = 10_000


class Content:
    """What is sent, and again where it did not arrive."""

    def __init__(self, content: bytes) -> None:
        self._content, self.size = content, len(content)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from one place up to another."""
        return self._content[start:stop]


class FileContent(Content):
    """The content of a local file, which is held a part at a time."""

    def __init__(self, file: Path) -> None:
        self._file, self.size = file, file.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from one place up to another."""
        with self._file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


def write_token(s3: S3, place: dict[str, str]) -> str | None:
    """Token of the write that made an object; empty for one of another origin, None for none. Raises as `S3.once`."""
    try:
        head = s3.once("head_object", **place)
    except FileNotFoundError:
        return None
    return str(head.get("Metadata", {}).get(_TOKEN, ""))


def send(s3: S3, content: Content, *, place: dict[str, str], token: str, is_new: bool, part_bytes: int) -> None:
    """Send an object, once.

    Args:
        place: `Bucket`, `Key`, and `about`, the object's name for errors.
        token: of this write.
        is_new: on the condition that there is no such object.
        part_bytes: a larger object is sent in parts of this size.

    Raises:
        Taken: the condition does not hold.
        Passing, Unsupported, StorageFull, StoreUnusable: as `S3.once`.
        StoreUnavailable: a part did not arrive in all attempts.
    """
    condition = {"IfNoneMatch": "*"} if is_new else {}
    if content.size > part_bytes:
        _send_in_parts(s3, content, place=place, condition=condition, token=token, part_bytes=part_bytes)
        return
    body = content.read(0, content.size)
    # Both are plain headers: a server that does not know one of them checks the other.
    digests = {"ContentMD5": _md5(body), "ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode()}
    sent = s3.once("put_object", Body=body, Metadata={_TOKEN: token}, **digests, **condition, **place)
    _refuse_damage(s3, sent.get("ETag", ""), body, place)


def _refuse_damage(s3: S3, etag: str, body: bytes, place: dict[str, str]) -> None:
    """Take back an object that is not what was sent, for a server that checks no digest. Raises Passing.

    Most servers answer with the MD5 of what they hold; where it is something else, the object itself tells.
    """
    if etag.strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest():
        return
    if s3.once("get_object", **place)["Content"] != body:
        s3.once("delete_object", **place)
        raise Passing("the server holds other bytes than were sent")


def _send_in_parts(
    s3: S3, content: Content, *, place: dict[str, str], condition: dict[str, str], token: str, part_bytes: int
) -> None:
    """Send a large object; what does not arrive is sent again, and the condition is for the whole."""
    if condition and write_token(s3, place) is not None:
        raise Taken
    size = max(part_bytes, -(-content.size // _MOST_PARTS))
    upload = s3.call("create_multipart_upload", Metadata={_TOKEN: token}, **place)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, content.size, size), start=1):
            body = content.read(start, min(start + size, content.size))
            sent = s3.call("upload_part", UploadId=upload, PartNumber=number, Body=body, ContentMD5=_md5(body), **place)
            parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        s3.once("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts}, **condition, **place)
    except BaseException:
        # What is left of an upload is kept, and paid for; where this fails too, a bucket's own rule removes it.
        with contextlib.suppress(SoftshardError, Passing, FileNotFoundError):
            s3.once("abort_multipart_upload", UploadId=upload, **place)
        raise


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
