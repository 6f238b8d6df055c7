"""Random generators, keyed by their purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

__all__ = ["keyed_generator", "keyed_seed"]


def keyed_seed(*key: str | int) -> int:
    """63-bit seed for one purpose, from blake2b of the key's JSON."""
    return int.from_bytes(_digest(key)[:8], "little") >> 1


def keyed_generator(*key: str | int) -> np.random.Generator:
    """Philox generator for one purpose, keyed by blake2b-128 of the key's JSON."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key), "little")))


def _digest(key: Sequence[str | int]) -> bytes:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
