"""Folders on this machine: made so that they become visible when they are complete, and found by almost their name."""

from __future__ import annotations

import contextlib
import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["did_you_mean", "new_folder"]


def did_you_mean(folder: str) -> str:
    """` (did you mean ./X?)` where a folder beside the one that is named has almost its name; else empty."""
    path = Path(folder).expanduser()
    try:
        beside = [item.name for item in path.parent.iterdir() if item.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    before = folder.rstrip("/").rpartition("/")
    return f" (did you mean {before[0] if before[1] else '.'}/{close[0]}?)" if close else ""


@contextlib.contextmanager
def new_folder(folder: Path, *, keep_existing: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success, rename it to `folder`; after an error, remove it.

    Its files have the mode of the umask, whatever a library has written them with: safetensors' can be read by their
    owner alone.

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
        _open_to_readers(made)
        with contextlib.suppress(OSError) if keep_existing else contextlib.nullcontext():
            made.rename(folder)


def _open_to_readers(folder: Path) -> None:
    """Give the files in a folder the mode of the umask, which the folder itself has been made with."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
