"""Where bytes are read from and written to; the one module that knows file systems.

Inputs are any fsspec URI, opened as a stream and decompressed on the way. Outputs go through `Store`, which writes
whole objects only: `put_once` and `create_exclusive` never overwrite, `replace` is for pointers and reports. Nothing
is visible before it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from softshard.errors import JobInvalid, OutputUnusable, PartConflict, SourceUnreadable, StorageFull

__all__ = ["InputFile", "LocalStore", "Store", "list_inputs", "open_input", "open_store", "sha256_of"]


_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ENOTSUP, errno.ENAMETOOLONG}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of a source; `version` changes when its content does (size and time of change, or ETag)."""

    uri: str
    size: int | None
    version: str


def list_inputs(uri: str, *, source: str) -> list[InputFile]:
    """Files that a file, folder, glob or fsspec URI stands for, sorted by name.

    Folders are walked; hidden files are left out.

    Raises:
        SourceUnreadable: nothing is there, or the file system cannot be reached.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
        if fs.isdir(path):
            found = fs.find(path)
        elif fs.exists(path):
            found = [path]
        else:
            found = [name for name in fs.glob(path) if not fs.isdir(name)]
        root = path.rstrip("/")
        shown = sorted(name for name in found if not _hidden(name, root))
        files = [_describe(fs, name) for name in shown]
    except (OSError, ImportError, ValueError) as error:
        raise SourceUnreadable(source=source, uri=uri, problem=f"cannot be listed: {error}") from error
    if not files:
        raise SourceUnreadable(source=source, uri=uri, problem="no such file or folder, or nothing in it")
    return files


def _hidden(name: str, root: str) -> bool:
    inside = name[len(root) :] if name.startswith(root) else name.rsplit("/", 1)[-1]
    return any(part.startswith(".") for part in inside.split("/") if part)


def _describe(fs: Any, name: str) -> InputFile:
    info = fs.info(name)
    version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return InputFile(uri=fs.unstrip_protocol(name), size=info.get("size"), version=f"{info.get('size')}-{version}")


@contextlib.contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """A file as a stream of bytes, decompressed by its ending (.zst, .gz); memory does not grow with its size."""
    import fsspec

    with fsspec.open(uri, mode="rb") as raw:
        if uri.endswith(".zst"):
            import pyarrow as pa

            # zstandard's own reader takes a file that was cut short for one that ends there; this one does not.
            with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
                yield io.BufferedReader(stream, 2**18)
        elif uri.endswith(".gz"):
            import gzip

            with gzip.open(raw, "rb") as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield raw


def sha256_of(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


class Store(Protocol):
    """An output folder. Paths are relative, with forward slashes, and cannot leave it."""

    @property
    def uri(self) -> str:
        """Where the store is, for messages."""

    def put_once(self, path: str, content: bytes) -> None:
        """Write a new object whole. An equal one that is there is adopted; another is a `PartConflict`."""

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; False, and nothing written, if one is there."""

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole in place of what is there."""

    def read(self, path: str) -> bytes:
        """Content of an object; FileNotFoundError if there is none."""

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""

    def size(self, path: str) -> int:
        """Bytes of an object that is there."""

    def list(self, prefix: str) -> list[str]:
        """Paths of the objects below a folder, sorted."""

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""

    def below(self, path: str) -> Store:
        """The store of a folder inside this one."""

    def local_path(self, path: str) -> Path:
        """A path for libraries that read and write files of their own."""


def open_store(uri: str | Path) -> Store:
    """The store of an output folder."""
    return LocalStore(uri)


class LocalStore:
    """A `Store` in a local folder.

    A write goes to a temporary file in `.tmp/`, is synced, and is linked to its final name, which fails if that
    exists; a rename, which would overwrite, is used by `replace` alone.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(str(root).removeprefix("file://")).absolute()

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self._root)

    def below(self, path: str) -> LocalStore:
        """The store of a folder inside this one."""
        return LocalStore(self.local_path(path))

    def put_once(self, path: str, content: bytes) -> None:
        """Write a new object whole; adopt an equal one.

        Raises:
            PartConflict: another object is there.
            StorageFull: no space is left; nothing is visible under the final name.
        """
        if not self.create_exclusive(path, content):
            expected, actual = sha256_of(content), sha256_of(self.read(path))
            if expected != actual:
                raise PartConflict(uri=str(self.local_path(path)), expected=expected, actual=actual)

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; False if one is there. Raises StorageFull."""
        target = self.local_path(path)
        with self._temporary(content, target) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            _sync_folder(target.parent)
        return True

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole in place of what is there. Raises StorageFull."""
        target = self.local_path(path)
        with self._temporary(content, target) as temporary:
            os.replace(temporary, target)
            _sync_folder(target.parent)

    def read(self, path: str) -> bytes:
        """Content of an object."""
        return self.local_path(path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        return self.local_path(path).is_file()

    def size(self, path: str) -> int:
        """Bytes of an object that is there."""
        return self.local_path(path).stat().st_size

    def list(self, prefix: str) -> list[str]:
        """Paths of the files below a folder, sorted, temporary ones left out."""
        folder = self.local_path(prefix)
        found = [file.relative_to(self._root) for file in folder.rglob("*") if file.is_file()]
        return sorted(file.as_posix() for file in found if ".tmp" not in file.parts)

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""
        self.local_path(path).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path:
        """Absolute path of an object.

        Raises:
            JobInvalid: the path would leave the folder.
        """
        pure = Path(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise JobInvalid(file=self.uri, place=path, problem="this path would leave the output folder")
        return self._root / pure

    @contextlib.contextmanager
    def _temporary(self, content: bytes, target: Path) -> Iterator[Path]:
        folder = self._root / ".tmp"
        temporary = folder / f"{target.name}.{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(content)
                _sync(file)
            yield temporary
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise StorageFull(uri=str(target)) from error
            if error.errno in _UNUSABLE:
                raise OutputUnusable(uri=str(target), problem=error.strerror or str(error)) from error
            raise
        finally:
            with contextlib.suppress(NotADirectoryError):
                temporary.unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
