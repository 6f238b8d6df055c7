"""What a store promises, whatever it lies on.

Paths are relative, with forward slashes, and cannot leave the store. Every write is of a whole object, and an object is
there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from softshard.errors import JobInvalid

__all__ = ["Store", "confined"]


def confined(path: str, *, uri: str) -> str:
    """The path without `.` parts, and empty for the store itself.

    Raises:
        JobInvalid: it would leave the store that lies at `uri`, or holds a NUL, which nothing can be named with.
    """
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if path.startswith("/") or ".." in parts:
        raise JobInvalid(file=uri, place=ascii(path), problem="this path would leave the output folder")
    if "\0" in path:
        raise JobInvalid(file=uri, place=ascii(path), problem="this path holds a NUL")
    return "/".join(parts)


class Store(Protocol):
    """An output folder."""

    @property
    def uri(self) -> str:
        """Where the store is, for messages and for `open_store` on another machine."""

    def put_once(self, path: str, content: bytes) -> None:
        """Write a new object whole. An equal one that is there is adopted; another is a `PartConflict`."""

    def put_file_once(self, path: str, file: Path) -> None:
        """`put_once` of a local file's content, which may be larger than the memory."""

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; False, and nothing written, if one is there.

        Of any number of callers at the same time exactly one is told True, equal content or not.
        """

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole in place of what is there."""

    def read(self, path: str) -> bytes:
        """Content of an object; FileNotFoundError if there is none."""

    def open(self, path: str) -> BinaryIO:
        """An object as a stream with random access, of which only what is read is fetched; FileNotFoundError."""

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""

    def size(self, path: str) -> int:
        """Bytes of an object; FileNotFoundError if there is none."""

    def names(self, prefix: str) -> list[str]:
        """Names of what lies directly in a folder, objects and folders, sorted."""

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below a folder, sorted."""

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""

    def below(self, path: str) -> Store:
        """The store of a folder inside this one."""

    def local_folder(self, path: str, files: Mapping[str, str]) -> Path:
        """A folder on this machine with some files of a folder, for libraries that open files of their own.

        On a disk it is the folder itself, and nothing is checked. Else it is a copy in the user's cache, named by the
        files' digests, compared with them, and made whole or not at all.

        Args:
            path: the folder.
            files: name to SHA-256.

        Raises:
            FileNotFoundError: a file is not there.
            PartCorrupt: a file is not the one that its digest names.
        """
