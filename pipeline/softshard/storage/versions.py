"""The version of a file, from what its file system tells of it."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["find_version"]

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


def find_version(info: dict[str, Any]) -> str | None:
    """The size, with the digests, ids and times that the file system has of a file; None where it has none."""
    known = {re.sub("[^a-z0-9]", "", key.lower()): value for key, value in info.items() if value}
    found = [f"{key}={known[key]}" for key in (*_CONTENT_KEYS, *_CHANGE_KEYS) if key in known]
    found = found or [f"{key}={known[key]}" for key in _CREATION_KEYS if key in known]
    return f"{info.get('size')}-{','.join(found)}" if found else None
