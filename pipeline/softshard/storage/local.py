"""A store in a local folder, on a disk or on a file system that several machines share.

Content is written to a temporary file in `.tmp/`, synced, and linked to its final name, which fails when that name
exists. A rename would overwrite, so only `replace` uses one.

A file system without hard links is refused. Without them no call of Python's makes a complete file under a name that
must be new: a file that is opened exclusively under its final name is seen while it is written, and stays incomplete
when its writer is killed; a rename after a look for the name overwrites what another machine has created in between.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from softshard.errors import OutputUnusable, PartConflict, StorageFull
from softshard.records.digest import sha256_hex, sha256_of_file
from softshard.storage.store import confined

__all__ = ["LocalStore", "disk_errors"]

_BLOCK_BYTES = 2**20
_TEMPORARY = ".tmp"
_UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, errno.EREMOTEIO, errno.ENOTCONN),
}

_WITH_LINKS = "a folder on a local disk or on NFS, or to s3://bucket/prefix"


class LocalStore:
    """A `Store` in a local folder."""

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
            OutputUnusable: the folder cannot be written, or its file system makes no hard links.
            PartConflict: another object is there.
            StorageFull: no space is left; nothing is visible under the final name.
        """
        if not self.create_exclusive(path, content):
            expected, actual = sha256_hex(content), sha256_hex(self.read(path))
            if expected != actual:
                raise PartConflict(uri=str(self.local_path(path)), expected=expected, actual=actual)

    def put_file_once(self, path: str, file: Path) -> None:
        """`put_once` of a local file's content, copied block by block. Raises PartConflict, StorageFull."""
        with file.open("rb") as source:
            if not self._link(path, source):
                expected, actual = sha256_of_file(file), sha256_of_file(self.local_path(path))
                if expected != actual:
                    raise PartConflict(uri=str(self.local_path(path)), expected=expected, actual=actual)

    def create_exclusive(self, path: str, content: bytes) -> bool:
        """Write a new object whole; False if one is there. Raises StorageFull."""
        return self._link(path, io.BytesIO(content))

    def _link(self, path: str, content: BinaryIO) -> bool:
        target = self.local_path(path)
        with self._temporary(content, target) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                self._check_links(temporary, error)
                raise
            _sync_folder(target.parent)
        return True

    def _check_links(self, temporary: Path, error: OSError) -> None:
        """Refuse a file system that links no file even beside itself. Raises OutputUnusable."""
        beside = temporary.with_name(f"{temporary.name}.link")
        try:
            os.link(temporary, beside)
        except OSError:
            problem = (
                f"its file system makes no hard links ({error.strerror}), by which files appear whole and are never"
                " overwritten; gcsfuse, rclone and exFAT have none"
            )
            raise OutputUnusable(uri=self.uri, problem=problem, instead=_WITH_LINKS) from error
        beside.unlink()

    def replace(self, path: str, content: bytes) -> None:
        """Write an object whole in place of what is there. Raises StorageFull."""
        target = self.local_path(path)
        with self._temporary(io.BytesIO(content), target) as temporary:
            os.replace(temporary, target)
            _sync_folder(target.parent)

    def read(self, path: str) -> bytes:
        """Content of an object."""
        return self.local_path(path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        """An object as a stream with random access."""
        return self.local_path(path).open("rb")

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        return self.local_path(path).is_file()

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return self.local_path(path).stat().st_size

    def names(self, prefix: str) -> list[str]:
        """Names of the files and folders directly in a folder, sorted; empty when there is no such folder."""
        try:
            return sorted(name for name in os.listdir(self.local_path(prefix)) if name != _TEMPORARY)
        except FileNotFoundError:
            return []

    def list(self, prefix: str) -> list[str]:
        """Paths of the files below a folder, sorted, temporary ones left out."""
        return sorted(_files_below(self.local_path(prefix), confined(prefix, uri=self.uri)))

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""
        self.local_path(path).unlink(missing_ok=True)

    def local_folder(self, path: str, files: Mapping[str, str]) -> Path:
        """The folder itself."""
        return self.local_path(path)

    def local_path(self, path: str) -> Path:
        """Absolute path of an object.

        Raises:
            JobInvalid: the path would leave the folder.
        """
        return self._root / confined(path, uri=self.uri)

    @contextlib.contextmanager
    def _temporary(self, content: BinaryIO, target: Path) -> Iterator[Path]:
        folder = self._root / _TEMPORARY
        temporary = folder / f"{target.name}.{uuid.uuid4().hex}"
        try:
            with disk_errors(target):
                folder.mkdir(parents=True, exist_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    shutil.copyfileobj(content, file, _BLOCK_BYTES)
                    _sync(file)
                yield temporary
        finally:
            # A read-only disk refuses to unlink even a file that does not exist; what is left is garbage.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _files_below(folder: Path | str, shown: str) -> Iterator[str]:
    """Paths of the files below a folder, each beginning with `shown`; empty when there is no such folder.

    Only folders are read: their entries tell files from folders, so no file is opened or measured.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            name = f"{shown}/{entry.name}" if shown else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files_below(entry.path, name) if entry.name != _TEMPORARY else ()
            elif entry.is_file():
                yield name


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Inside this context, raise StorageFull or OutputUnusable, with the file's path, for errors of the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(uri=str(target)) from error
        if error.errno in _UNUSABLE:
            raise OutputUnusable(uri=str(target), problem=error.strerror or str(error)) from error
        raise


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
