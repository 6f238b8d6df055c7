"""Rows of the table of bad inputs: what is done to an output, and what a command then says of it.

A case is a function that makes a fault. Its docstring has three lines: what is wrong, how it was made, and a line of
what the command writes, in which OUT is the output folder, IN the folder of the job and its documents, and … anything.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from softshard.corpus.manifest import read_corpus_manifest
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import read_manifest
from softshard.storage import LocalStore

__all__ = ["Case", "Place", "Section", "flip"]

WITHOUT = {"train": {"retention": None}, "teacher": {"folds": 0}}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A copy of a finished output, and a job for it beside documents of its own."""

    finished: Path
    """The output itself, not to be changed."""
    out: Path
    folder: Path
    scheduler: str
    """Address of a Dask scheduler."""
    model: Path
    undo: ExitStack = field(default_factory=ExitStack)
    """Ends what a fault has begun, such as a mount."""
    then: list[Callable[[], None]] = field(default_factory=list)
    """What is to be seen after the command."""

    @property
    def targets(self) -> Path:
        return self.out / "targets"

    def part(self, number: int = 0) -> Path:
        return self.targets / read_manifest(self.targets).parts[number].path

    def receipt(self, number: int = 0) -> Path:
        return self.targets / receipt_path(read_manifest(self.targets).parts[number].part_id)

    def manifest(self) -> Path:
        return next((self.targets / "manifests").iterdir())

    def slice(self) -> Path:
        corpus = read_corpus_manifest(LocalStore(self.out / "corpus"))
        assert corpus is not None
        return self.out / "corpus" / corpus.slices[0].path

    def change_job(self, **sections: object) -> None:
        path = self.folder / "job.yaml"
        job = yaml.safe_load(path.read_text())
        for name, values in sections.items():
            job[name] = {**job[name], **values} if isinstance(values, dict) else values
        path.write_text(yaml.safe_dump(job, sort_keys=False))

    def read_from(self, uri: object, **source: object) -> None:
        """Have the job read one source, into an output that is empty."""
        shutil.rmtree(self.out)
        described = {"name": "s", "uri": str(uri), "style": "plain", "license": "MIT", "rights_basis": "owned"}
        self.change_job(corpus={"sources": [described | source], "holdout_fraction": 0.0}, **WITHOUT)

    def read_file(self, name: str, content: bytes, **source: object) -> None:
        """Have the job read one file that holds some bytes, and nothing else."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        self.read_from(self.folder / name, **source)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault."""

    what: str
    how: str
    said: str
    command: str
    code: int
    make: Callable[[Place], object]

    def is_said_in(self, line: str, place: Place) -> bool:
        """Whether a line is the one that is expected."""
        known = self.said.replace("OUT", str(place.out)).replace("IN/", f"{place.folder}/")
        return re.fullmatch(".*".join(map(re.escape, known.split("…"))), line) is not None

    @property
    def row(self) -> str:
        """Its row of the table."""
        said = f"`` {self.said} ``" if "`" in self.said else f"`{self.said}`"
        cells = (self.what, self.how, f"`{self.command}`", str(self.code), said)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


class Section:
    """Some cases under one heading."""

    def __init__(self, heading: str) -> None:
        self.heading, self.cases = heading, list[Case]()

    def __call__(self, command: str, code: int) -> Callable[[Callable[[Place], object]], Callable[[Place], object]]:
        def register(make: Callable[[Place], object]) -> Callable[[Place], object]:
            what, how, said = (line.strip() for line in (make.__doc__ or "").strip().splitlines())
            self.cases.append(Case(what=what, how=how, said=said, command=command, code=code, make=make))
            return make

        return register

    def lines(self) -> Iterator[str]:
        """The heading and the table."""
        yield from (
            f"### {self.heading}",
            "",
            "| fault | how it was made | command | exit | what it says |",
            "|---|---|---|---|---|",
        )
        yield from (case.row for case in self.cases)
        yield ""


def flip(path: Path, place: int | None = None) -> None:
    """Flip a bit of the middle byte, or of another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 16
    path.write_bytes(content)
