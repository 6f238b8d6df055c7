"""Local copies of files in an object store, for libraries that open files themselves.

The copies are in the user's cache (XDG_CACHE_HOME, else ~/.cache). Their names are digests of their contents, so all
runs share one copy. The cache may be deleted while nothing runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from softshard.errors import PartCorrupt
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.storage.folders import new_folder
from softshard.storage.local import disk_errors

__all__ = ["copy_folder"]


def copy_folder(read: Callable[[str], bytes], files: Mapping[str, str], *, uri: str) -> Path:
    """A local folder with a copy of each file.

    Args:
        read: returns the content of a file, given its name.
        files: SHA-256 by name.
        uri: of the folder that the files come from, for errors.

    Raises:
        FileNotFoundError: from `read`.
        PartCorrupt: a file has another digest than `files` names.
        StorageFull, OutputUnusable: the cache cannot be written.
    """
    digest = canonical_digest(sorted(files.items()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "softshard" / "copies"
    folder = cache / digest[:32]
    if _is_whole(folder, files):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(cache), new_folder(folder, keep_existing=True) as copy:
        for name, expected in files.items():
            content = read(name)
            if sha256_hex(content) != expected:
                raise PartCorrupt(uri=f"{uri}/{name}", problem=f"is not the file with sha256 {expected[:16]}")
            (copy / name).write_bytes(content)
    return folder


def _is_whole(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        return all(sha256_hex((folder / name).read_bytes()) == expected for name, expected in files.items())
    except OSError:
        return False
