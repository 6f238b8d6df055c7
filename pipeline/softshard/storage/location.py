"""Finds the store of an output by its URI: a local folder, or one of `STORES`. A URI with a credential is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from softshard.errors import JobInvalid
from softshard.storage.local import LocalStore
from softshard.storage.objects import ObjectStore
from softshard.storage.store import Store
from softshard.telemetry.redaction import without_credentials

__all__ = ["OUTPUT_FORMS", "STORES", "StoreKind", "find_store_kind", "find_uri_problem", "open_store"]

_USER = re.compile(r"^(?!s3)([a-z][a-z0-9+.-]*://)[^/?#\s@:]+@")
"""A user name without a password, which some file systems want in the URI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKind:
    """A kind of store that is not a local folder."""

    scheme: str
    """How its URIs begin."""
    example: str
    """A URI, for messages."""
    pattern: re.Pattern[str]
    """Matches the beginning of every complete URI."""
    lacking: str
    """What a URI lacks that does not match the pattern."""
    open: Callable[[str], Store]


STORES = (
    StoreKind(
        scheme="s3://",
        example="s3://bucket/prefix",
        pattern=re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/|$)"),
        lacking="bucket",
        open=ObjectStore,
    ),
)
OUTPUT_FORMS = " or ".join(["a local folder", *(kind.example for kind in STORES)])
"""What an output may be, for messages."""


def open_store(uri: str | Path) -> Store:
    """Open the store of an output folder: a path, or a URI of one of `STORES`.

    Raises:
        JobInvalid: the URI is of another kind, is not complete, or holds a credential.
    """
    text = str(uri)
    if "://" not in text or text.startswith("file://"):
        return LocalStore(uri)
    kind = find_store_kind(text)
    problem = find_uri_problem(text) or (f"must be {OUTPUT_FORMS}" if kind is None else None)
    if problem is not None or kind is None:
        raise JobInvalid(file=without_credentials(text), place="", problem=str(problem))
    return kind.open(text)


def find_store_kind(uri: str) -> StoreKind | None:
    """The kind of store that a URI belongs to; None for a path and for every other URI."""
    return next((kind for kind in STORES if uri.startswith(kind.scheme)), None)


def find_uri_problem(uri: str) -> str | None:
    """Why a URI must not be written into an output: it holds a credential, or it is not complete. None: it may be."""
    plain = _USER.sub(r"\1", uri)
    if "://" in plain and without_credentials(plain) != plain:
        return "holds a credential; give it in the environment (AWS_ACCESS_KEY_ID and the like), and leave it out here"
    kind = find_store_kind(uri)
    if kind is not None and not kind.pattern.match(uri):
        return f"has no {kind.lacking} where one should be: {kind.example}"
    return None
