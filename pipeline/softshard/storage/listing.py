"""Lists the files of a source: those of a folder with everything below it, those that match a glob, or one file.

Local folders are listed through links, each real folder once. Hidden files are left out. Objects of an S3-compatible
server are listed with the same client as outputs.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from softshard.errors import SourceUnreadable
from softshard.storage.inputs import open_bucket
from softshard.storage.outages import find_outage, network_errors, source_failure
from softshard.storage.s3 import S3
from softshard.storage.versions import find_version

__all__ = ["InputFile", "Inputs", "find_inputs", "forget_listings", "is_unchanged", "list_inputs"]

_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of a source."""

    uri: str
    size: int | None
    version: str | None
    """Changes with the content: the size, with the digests, ids and times that the file system has of the file. None:
    it has none, and only the content tells (`content_version`)."""
    found: tuple[str, ...] = field(default=(), compare=False)
    """Parts of its path that nobody named: below a folder, or matched by a bare `*` or `**` of a glob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a URI stands for."""

    files: list[InputFile]
    """Sorted by name."""
    folders: list[str]
    """URIs of the folders that a glob matched, sorted; their files are not listed."""


def list_inputs(uri: str, *, source: str) -> list[InputFile]:
    """The files of `find_inputs`."""
    return find_inputs(uri, source=source).files


def find_inputs(uri: str, *, source: str) -> Inputs:
    """List the files of a file, folder, glob or fsspec URI; `source` is the source's name, for errors.

    Raises:
        SourceUnreadable: nothing is there, or the file system refuses the request.
        SourceUnavailable: the file system cannot be reached for now.
        ExtraMissing: the file system's package is not installed.
        StoreUnavailable, StoreUnusable: an object store cannot be reached, or refuses the request.
    """
    if uri.startswith("s3://"):
        inputs = _find_objects(uri)
    else:
        try:
            inputs = _find_files(uri)
        except network_errors(OSError, ImportError, ValueError) as error:
            raise source_failure(error, source=source, uri=uri, problem="cannot be listed") from error
    if not inputs.files:
        problem = "no such file or folder, or nothing in it"
        if inputs.folders:
            problem = f"matches no file but {len(inputs.folders)} folder(s); add /** to read what is in them"
        raise SourceUnreadable(source=source, uri=uri, problem=problem)
    return inputs


def forget_listings(uri: str) -> None:
    """Make the next listing ask the file system: several keep what they have listed for as long as the process runs."""
    if not uri.startswith("s3://"):
        import fsspec

        with contextlib.suppress(ImportError, ValueError):
            fsspec.core.url_to_fs(uri)[0].invalidate_cache()


def is_unchanged(file: InputFile) -> bool:
    """Whether a file that was read is what was listed.

    A file that is fetched in parts, or whose size was listed earlier, can be a mixture of two contents. True without a
    look for local files, for objects of S3, which are read by their ETag, and for the hub, which lists whole folders.

    Raises:
        OSError and `network_errors`: the file system cannot be asked.
    """
    if "://" not in file.uri or file.uri.startswith(("file://", "s3://", "hf://")):
        return True
    import fsspec

    fs, path = fsspec.core.url_to_fs(file.uri)
    fs.invalidate_cache(path)
    now = _describe(fs, path, ())
    return (now.size, now.version) == (file.size, file.version)


def _find_files(uri: str) -> Inputs:
    import fsspec
    from fsspec.archive import AbstractArchiveFileSystem
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except TypeError as error:
        raise ValueError(f"the URI is not complete: {error}") from error
    is_local = isinstance(fs, LocalFileSystem)
    folders: list[str] = []
    if fs.isdir(path):
        names = _walk_local(path, keep_hidden=False)[0] if is_local else fs.find(path)
        found = [(name, _found_below(path, name)) for name in names]
    elif fs.exists(path):
        found = [(path, ())]
    else:
        names, folders = _glob_local(path) if is_local else _glob(fs, path)
        found = [(name, _found_by(path, name)) for name in names]
    archive = f"::{uri.partition('::')[2]}" if isinstance(fs, AbstractArchiveFileSystem) else ""
    files = [_describe(fs, name, parts, archive) for name, parts in sorted(found) if not _is_hidden(name, path)]
    if not files:
        # `exists` and `isdir` of several file systems take a server that is away for a file that is not there.
        _ask_why(fs, path)
    return Inputs(files=files, folders=[fs.unstrip_protocol(name) for name in sorted(folders)])


def _walk_local(root: str, *, keep_hidden: bool, depth: int | None = None) -> tuple[list[str], list[str]]:
    """Files and folders below a folder, to a depth.

    A folder that a link leads to is listed under the link, unless it is listed already. A folder that cannot be opened
    raises OSError.
    """
    listed: set[tuple[int, int]] = set()
    files: list[str] = []
    below: list[str] = []
    waiting = [root]
    while waiting:
        links: list[str] = []
        for top in sorted(waiting):
            for folder, folders, names in os.walk(top, onerror=_refuse_unreadable):
                place = os.stat(folder)
                if (place.st_dev, place.st_ino) in listed:
                    folders.clear()
                    continue
                listed.add((place.st_dev, place.st_ino))
                if not keep_hidden:
                    folders[:] = [name for name in folders if not name.startswith(".")]
                paths = [os.path.join(folder, name) for name in folders]
                below += paths
                files += [path for name in names if not _is_device(path := os.path.join(folder, name))]
                if depth is not None and _depth(folder, root) >= depth:
                    folders.clear()
                else:
                    links += [path for path in paths if os.path.islink(path)]
        waiting = links
    return files, below


def _depth(folder: str, root: str) -> int:
    return len([part for part in folder[len(root) :].split("/") if part])


def _refuse_unreadable(error: OSError) -> None:
    # Every ext4 disk has this folder, and only root may open it.
    if os.path.basename(str(error.filename)) != "lost+found":
        raise error


def _is_device(path: str) -> bool:
    """Whether a path is a pipe, a socket or a device; a link that leads nowhere is none, and fails when it is read."""
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(os.stat(path).st_mode)
    return False


def _glob_local(pattern: str) -> tuple[list[str], list[str]]:
    """Files and folders that match a glob, links followed."""
    root = _root(pattern)
    if not _MAGIC.search(pattern) or not os.path.isdir(root):
        return [], []
    depth = None if "**" in pattern else pattern.count("/") - root.count("/")
    names, folders = _walk_local(root, keep_hidden=True, depth=depth)
    matches = _matcher(pattern)
    return [name for name in names if matches(name)], _whole(pattern, [name for name in folders if matches(name)])


def _glob(fs: Any, pattern: str) -> tuple[list[str], list[str]]:
    """Files and folders that match a glob."""
    known = fs.glob(pattern, detail=True)
    folders = [name for name, info in known.items() if info.get("type") == "directory"]
    return [name for name in known if name not in set(folders)], _whole(pattern, folders)


def _whole(pattern: str, folders: Iterable[str]) -> list[str]:
    """The folders that a glob matches as a whole; `**` goes into all of them."""
    return [] if "**" in pattern else sorted(folders)


def _matcher(pattern: str) -> Callable[[str], object]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _root(pattern: str) -> str:
    """The folder above the first part of a path that is a glob."""
    magic = _MAGIC.search(pattern)
    return pattern[: pattern.rfind("/", 0, magic.start()) + 1] if magic else pattern


def _found_below(root: str, name: str) -> tuple[str, ...]:
    return tuple(name[len(root) :].strip("/").split("/"))


def _found_by(pattern: str, name: str) -> tuple[str, ...]:
    """The parts of a name that a bare `*` or `**` of a glob matched; other patterns name what they match."""
    wanted, parts = pattern.split("/"), name.split("/")
    if "**" in wanted:
        first, last = wanted.index("**"), len(wanted) - 1 - wanted[::-1].index("**")
        middle = len(parts) - first - (len(wanted) - last - 1)
        wanted = [*wanted[:first], *["*"] * middle, *wanted[last + 1 :]]
    return tuple(part for pattern_part, part in zip(wanted, parts, strict=False) if pattern_part == "*")


def _find_objects(uri: str) -> Inputs:
    """Objects of an S3 URI: the object of that key, else those below it, else those that match it as a glob."""
    s3, bucket, key = open_bucket(uri)
    if key and not key.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            head = s3.call("head_object", about=key, Bucket=bucket, Key=key)
            return Inputs(files=[_object(bucket, key, (), size=head["ContentLength"], etag=head["ETag"])], folders=[])
    root = key.rstrip("/")
    found = _objects_below(s3, bucket, f"{root}/" if root else "")
    names = {name: _found_below(root, name) for name in found}
    folders: list[str] = []
    if not found and _MAGIC.search(key):
        found = _objects_below(s3, bucket, _root(key))
        matches = _matcher(key)
        names = {name: _found_by(key, name) for name in found if matches(name)}
        parents = {name[: place.start()] for name in found for place in re.finditer("/", name)}
        folders = _whole(key, (parent for parent in parents if matches(parent)))
    files = [
        _object(bucket, name, names[name], size=found[name]["Size"], etag=found[name]["ETag"])
        for name in sorted(names)
        if not _is_hidden(name, root)
    ]
    return Inputs(files=files, folders=[f"s3://{bucket}/{name}" for name in folders])


def _objects_below(s3: S3, bucket: str, prefix: str) -> dict[str, Any]:
    """Entries of a listing by key; keys that end in a slash are markers of folders and are left out."""
    pages = s3.pages(bucket=bucket, prefix=prefix, about=prefix)
    return {item["Key"]: item for page in pages for item in page.get("Contents", ()) if not item["Key"].endswith("/")}


def _object(bucket: str, key: str, found: tuple[str, ...], *, size: int, etag: str) -> InputFile:
    return InputFile(uri=f"s3://{bucket}/{key}", size=size, version=f"{size}-{etag}", found=found)


def _is_hidden(name: str, path: str) -> bool:
    root = path.rstrip("/")
    inside = name[len(root) :] if name.startswith(root) else name.rsplit("/", 1)[-1]
    return any(part.startswith(".") for part in inside.split("/") if part)


def _ask_why(fs: Any, path: str) -> None:
    """Raise what the file system raises for a path that is not there if that is an outage."""
    try:
        fs.info(path)
    except network_errors(OSError, ValueError) as error:
        if find_outage(error) is not None:
            raise


def _describe(fs: Any, name: str, found: tuple[str, ...], archive: str = "") -> InputFile:
    """A file; `archive` is what follows its name in a URI where the file system is an archive in another one."""
    info = fs.info(name)
    uri = f"{fs.unstrip_protocol(name)}{archive}"
    return InputFile(uri=uri, size=info.get("size"), version=find_version(info), found=found)
