"""Where an output is, by its URI: a folder, or a prefix in a bucket. A URI that holds a credential is refused."""

from __future__ import annotations

import re
from pathlib import Path

from softshard.errors import JobInvalid
from softshard.storage.local import LocalStore
from softshard.storage.objects import ObjectStore
from softshard.storage.store import Store
from softshard.telemetry.redaction import without_credentials

__all__ = ["open_store", "problem_of_uri"]

_USER = re.compile(r"^(?!s3)([a-z][a-z0-9+.-]*://)[^/?#\s@:]+@")
"""A user's name without a password, which other file systems want."""
_BUCKET = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/|$)")


def open_store(uri: str | Path) -> Store:
    """The store of an output folder: `s3://bucket/prefix`, or a path.

    Raises:
        JobInvalid: the URI is of another kind, has no bucket, or holds a credential.
    """
    text = str(uri)
    if "://" not in text or text.startswith("file://"):
        return LocalStore(uri)
    problem = problem_of_uri(text)
    if problem is None and not text.startswith("s3://"):
        problem = "is neither a local folder nor s3://bucket/prefix"
    if problem is not None:
        raise JobInvalid(file=without_credentials(text), place="", problem=problem)
    return ObjectStore(text)


def problem_of_uri(uri: str) -> str | None:
    """What makes a URI unfit to be written down: a credential in it, or, of an S3 one, no bucket. None: nothing."""
    plain = _USER.sub(r"\1", uri)
    if "://" in plain and without_credentials(plain) != plain:
        return "holds a credential; give it in the environment (AWS_ACCESS_KEY_ID and the like), and leave it out here"
    if uri.startswith("s3://") and not _BUCKET.match(uri):
        return "has no bucket where one should be: s3://bucket/prefix"
    return None
