"""Digests: SHA-256, in hex, of values and of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from softshard.records.canonical import compact_json, compact_pieces

__all__ = ["canonical_digest", "members_digest", "sha256_hex", "sha256_of_file", "sha256_of_stream"]


def canonical_digest(value: Any) -> str:
    """Digest of a value's compact canonical JSON. Models inside it are dumped whole."""
    return sha256_hex(compact_json(value).encode())


def members_digest(members: Mapping[str, Any]) -> str:
    """`canonical_digest` of a record, given by its members; an iterator is a list whose items are taken one by one."""
    digest = hashlib.sha256()
    for piece in compact_pieces(members):
        digest.update(piece)
    return digest.hexdigest()


def sha256_hex(content: bytes) -> str:
    """Digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_stream(stream: BinaryIO) -> str:
    """Digest of what is left in a stream, read in blocks."""
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_of_file(path: Path) -> str:
    """Digest of a local file, read in blocks."""
    with path.open("rb") as file:
        return sha256_of_stream(file)
