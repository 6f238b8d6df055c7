"""Digests: of a value, which is what settings are named by, and of bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

__all__ = ["canonical_digest", "sha256_hex"]


def canonical_digest(value: Any) -> str:
    """SHA-256, in hex, of a value's canonical JSON: sorted keys, no spaces, UTF-8. Models are dumped whole."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no canonical form")

    text = json.dumps(value, default=plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_hex(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()
