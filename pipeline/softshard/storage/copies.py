"""Copies on this machine of files that lie in an object store, for libraries that open files of their own.

They lie in the user's cache (XDG_CACHE_HOME, else ~/.cache), named by the digests of what they hold, so that one copy
serves every run that needs it. The cache may be deleted while nothing runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from softshard.errors import PartCorrupt
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.storage.local import named_errors

__all__ = ["copied_folder"]


def copied_folder(read: Callable[[str], bytes], files: Mapping[str, str], *, uri: str) -> Path:
    """A folder with these files.

    Args:
        read: gives a file's content by its name.
        files: name to SHA-256.
        uri: of the folder that they come from, for errors.

    Raises:
        FileNotFoundError: from `read`.
        PartCorrupt: a file is not the one that its digest names.
        StorageFull, OutputUnusable: the cache cannot be written.
    """
    digest = canonical_digest(sorted(files.items()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "softshard" / "copies"
    folder = cache / digest[:32]
    if _is_whole(folder, files):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with named_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
            made = Path(scratch) / "copy"
            made.mkdir()
            for name, expected in files.items():
                content = read(name)
                if sha256_hex(content) != expected:
                    raise PartCorrupt(uri=f"{uri}/{name}", problem=f"is not the file with sha256 {expected[:16]}")
                (made / name).write_bytes(content)
            # Another process may have been faster: its copy is the same.
            with contextlib.suppress(FileExistsError, OSError):
                made.rename(folder)
    return folder


def _is_whole(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        return all(sha256_hex((folder / name).read_bytes()) == expected for name, expected in files.items())
    except OSError:
        return False
