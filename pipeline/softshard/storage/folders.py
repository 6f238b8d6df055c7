"""Folders on this machine that become visible when they are complete."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["new_folder"]


@contextlib.contextmanager
def new_folder(folder: Path, *, keep_existing: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success, rename it to `folder`; after an error, remove it.

    Args:
        folder: what is made; its parents are created.
        keep_existing: leave a folder that another process has made in the meantime, and raise nothing.

    Raises:
        OSError: the folder cannot be written, or without `keep_existing` there is one already that is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        yield made
        with contextlib.suppress(OSError) if keep_existing else contextlib.nullcontext():
            made.rename(folder)
