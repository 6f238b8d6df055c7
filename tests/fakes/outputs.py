"""What tests look at in an output folder, and how they wait for something in it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path


def tree(folder, *, of=("corpus", "teacher", "targets", "adapter", "report")):
    """Digest of every file below some folders of an output."""
    files = [
        file for name in of for file in (Path(folder) / name).rglob("*") if file.is_file() and ".tmp" not in file.parts
    ]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def times(folder):
    return {str(file): file.stat().st_mtime_ns for file in Path(folder).rglob("*") if file.is_file()}


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
