"""Model folders: found or fetched, checked without loading the weights, identified by a digest.

No code that comes with a model is run: remote code is refused without asking, and weights are safetensors, never
pickles.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from softshard.errors import (
    HubUnavailable,
    ModelInvalid,
    ModelMissing,
    OutputUnusable,
    PackageMissing,
    StorageFull,
    VocabularyMismatch,
    full_disk,
)
from softshard.storage import did_you_mean, find_outage, network_errors

__all__ = [
    "check_context",
    "check_packages",
    "check_vocabulary",
    "check_weights",
    "num_weights",
    "output_size",
    "read_architecture",
    "read_config",
    "resolve_model",
    "weights_digest",
]

_INDEX = "model.safetensors.index.json"


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """Local folder of a model: the folder itself, or a snapshot of the model on the hub.

    Raises:
        ModelMissing: it can only be a folder, and there is none.
        ModelInvalid: it is neither, or the folder has no config.json.
        HubUnavailable: there is no such folder, and the hub cannot be reached for now.
        StorageFull, OutputUnusable: what the hub gives cannot be written to the cache of its library.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ModelMissing(model=model, hint=did_you_mean(model))
        folder = _from_hub(model, revision)
    if not (folder / "config.json").is_file():
        raise ModelInvalid(model=model, problem="the folder has no config.json, so it is not a transformers model")
    return folder


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except network_errors(HFValidationError, OSError) as error:
        if (unwritten := _unwritten(error, cache=constants.HF_HUB_CACHE)) is not None:
            raise unwritten from error
        hint = did_you_mean(model)
        if (reason := find_outage(error)) is not None:
            raise HubUnavailable(model=model, reason=reason, hint=hint) from error
        problem = f"no such folder{hint}, and the hub gives none of this name ({type(error).__name__})"
        raise ModelInvalid(model=model, problem=problem) from error


def _unwritten(error: BaseException, *, cache: str) -> StorageFull | OutputUnusable | None:
    """The error to raise where the hub's library cannot write to its cache; None for every other error."""
    if (full := full_disk(error, uri=cache)) is not None:
        return full
    if isinstance(error, OSError) and error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        uri, problem = str(error.filename or cache), error.strerror or str(error)
        return OutputUnusable(uri=uri, problem=problem, setting="HF_HOME")
    return None


def check_vocabulary(*, model: str, model_size: int, data: str, data_size: int) -> None:
    """Refuse a model that has no logit for some token of the data. Raises VocabularyMismatch."""
    if model_size < data_size:
        raise VocabularyMismatch(data=data, data_size=data_size, model=model, model_size=model_size)


def read_architecture(folder: Path) -> str:
    """Name of a model's class, according to its config. Raises ModelInvalid."""
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures")
    except (OSError, ValueError) as error:
        raise ModelInvalid(model=str(folder), problem=f"its config.json cannot be read: {error}") from error
    if not names:
        raise ModelInvalid(model=str(folder), problem="its config.json names no architecture")
    return str(names[0])


def output_size(folder: Path) -> int:
    """Number of tokens that a model has logits for, according to its config, including padding. Raises ModelInvalid."""
    return int(_text_config(folder).vocab_size)


def check_context(folder: Path, *, context_tokens: int) -> None:
    """Refuse sequences that are longer than a model has positions for. Raises ModelInvalid."""
    longest = getattr(_text_config(folder), "max_position_embeddings", None)
    if longest is not None and context_tokens > longest:
        problem = (
            f"has {longest} positions, `corpus.context_tokens` is {context_tokens}; lower it, or use another model"
        )
        raise ModelInvalid(model=str(folder), problem=problem)


def check_packages(folder: Path, *, setting: str) -> None:
    """Refuse a quantised model whose package is not installed. Raises PackageMissing, and ModelInvalid.

    `setting` is the key of the job file that names the model.
    """
    config = read_config(folder)
    values = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if values is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    method = str(values.get("quant_method", "an unnamed method"))
    try:
        AutoHfQuantizer.from_config(dict(values), pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        raise PackageMissing(setting=setting, model=str(folder), method=method, problem=str(error)) from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        problem = f"is quantised ({method}) and cannot be used here: {error}"
        raise ModelInvalid(model=str(folder), problem=problem) from error


def _text_config(folder: Path) -> Any:
    return read_config(folder).get_text_config()


def read_config(folder: Path) -> Any:
    """A model's configuration, as transformers reads it. Raises ModelInvalid."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalid(model=str(folder), problem=f"its config.json cannot be read: {error}") from error


def check_weights(folder: Path) -> list[Path]:
    """The weight files of a model folder, sorted by name; their lengths are checked, their contents are not read.

    Raises:
        ModelInvalid: the folder holds no safetensors, lacks a shard that its index names, or a file is truncated.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if missing := sorted(_shards_of_index(folder) - {file.name for file in files}):
        named = f"{missing[0]}, which {_INDEX} names, is missing ({len(missing)} in all)"
        raise ModelInvalid(model=str(folder), problem=f"the shard {named}; fetch the model again")
    if not files:
        raise ModelInvalid(model=str(folder), problem="the folder has no weights (*.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            problem = f"{file.name} is cut off or no safetensors file ({error}); fetch the model again"
            raise ModelInvalid(model=str(folder), problem=problem) from error
    return files


def _shards_of_index(folder: Path) -> set[str]:
    index = folder / _INDEX
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelInvalid(model=str(folder), problem=f"its {_INDEX} cannot be read: {error!r}") from error


def num_weights(folder: Path) -> int:
    """Number of weights of a model folder, from the headers of its files. Raises ModelInvalid."""
    from safetensors import safe_open

    total = 0
    for file in check_weights(folder):
        with safe_open(file, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - no mapping
    return total


@lru_cache(maxsize=8)
def weights_digest(folder: Path) -> str:
    """SHA-256, in hex, of a model folder's config and then its weights (safetensors), sorted by name.

    Raises:
        ModelInvalid: see `check_weights`.
    """
    files = check_weights(folder)
    digest = hashlib.sha256()
    for file in (folder / "config.json", *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
