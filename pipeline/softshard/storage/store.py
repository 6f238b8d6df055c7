"""The interface of every store.

Paths are relative, with forward slashes, and cannot leave the store. Objects are written whole, and a reader finds an
object complete or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from softshard.errors import JobInvalid

__all__ = ["Store", "confined"]


def confined(path: str, *, uri: str) -> str:
    """The path without empty and `.` parts; the empty path is the store itself.

    Raises:
        JobInvalid: the path would leave the store at `uri`, or contains a NUL, which no file name can.
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
        """URI of the store, for messages and for `open_store` on another machine."""

    def put_once(self, path: str, content: bytes) -> None:
        """Write a new object whole. An equal object that exists is kept; another one raises PartConflict."""

    def put_file_once(self, path: str, file: Path) -> None:
        """`put_once` of a local file's content, which may be larger than memory."""

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; return False and write nothing when one exists.

        Of any number of concurrent callers exactly one gets True, whether their contents are equal or not.
        """

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole, over one that exists."""

    def read(self, path: str) -> bytes:
        """Content of an object; FileNotFoundError if there is none."""

    def open(self, path: str) -> BinaryIO:
        """An object as a stream with random access, which fetches only what is read; raises FileNotFoundError."""

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""

    def size(self, path: str) -> int:
        """Bytes of an object; FileNotFoundError if there is none."""

    def names(self, prefix: str) -> list[str]:
        """Names of the objects and folders directly in a folder, sorted."""

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects below a folder, sorted."""

    def remove(self, path: str) -> None:
        """Delete an object if it exists."""

    def below(self, path: str) -> Store:
        """The store of a folder inside this one."""

    def local_folder(self, path: str, files: Mapping[str, str]) -> Path:
        """A local folder with some files of a folder, for libraries that open files themselves.

        Of a local store it is the folder itself, and nothing is checked. Otherwise it is a complete copy in the user's
        cache, whose files have been compared with their digests.

        Args:
            path: the folder.
            files: SHA-256 by name.

        Raises:
            FileNotFoundError: a file does not exist.
            PartCorrupt: a file has another digest than `files` names.
        """
