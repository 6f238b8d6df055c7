"""Causal language models and tokenizers: found, checked, named by digest, loaded.

A tokenizer's fingerprint and its vocabulary size travel with everything that is made with it, and are compared
wherever data meets a model. Nothing here runs code that comes with a model: remote code is refused, also where a
terminal would be asked, and weights are safetensors, never pickles.
"""

from __future__ import annotations

import gc
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softshard.errors import ModelInvalid, TokenizerMismatch, TryAgain, VocabularyMismatch

if TYPE_CHECKING:
    import torch

    from softshard.config import DataType

__all__ = [
    "Tokenizer",
    "architecture_of",
    "check_context",
    "check_tokenizer",
    "check_vocabulary",
    "check_weights",
    "load_model",
    "load_tokenizer",
    "out_of_memory",
    "output_size",
    "release_memory",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
    "tokenizer_of",
    "weights_digest",
]

_INDEX = "model.safetensors.index.json"


def resolve_model(model: str, *, revision: str | None = None) -> Path:
    """Local folder of a model: the folder itself, or a snapshot of the hub's.

    Raises:
        ModelInvalid: it is neither, or the folder has no config.json.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ModelInvalid(model=model, problem="no such folder")
        folder = _from_hub(model, revision)
    if not (folder / "config.json").is_file():
        raise ModelInvalid(model=model, problem="the folder has no config.json, so it is not a transformers model")
    return folder


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise TryAgain(f"{model}: no such folder, and the hub cannot be reached for a model of this name") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        problem = f"no such folder, and the hub gives none of this name ({type(error).__name__})"
        raise ModelInvalid(model=model, problem=problem) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what must agree between data and models."""

    backend: Any
    """The tokenizer of transformers."""
    fingerprint: str
    """SHA-256, in hex, of its whole definition and of the ids that open and close a document."""
    vocab_size: int
    """Tokens it can give; logits beyond them are padding."""
    bos_id: int | None
    """Token that the tokenizer puts before a text, if it does."""
    eos_id: int
    """Token that closes a document."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; a text is never cut, and one that spells a special token does not become that token."""
        if not texts:
            return []
        encoded = self.backend(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of some ids."""
        text: str = self.backend.decode(ids, clean_up_tokenization_spaces=False)
        return text


@lru_cache(maxsize=8)
def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the fast tokenizer of a model folder.

    Raises:
        ModelInvalid: there is none, it is not a fast one, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalid(model=str(folder), problem=f"the tokenizer cannot be loaded: {error}") from error
    tokenizer = tokenizer_of(backend, name=str(folder))
    backend.model_max_length = 10**30
    return tokenizer


def tokenizer_of(backend: Any, *, name: str) -> Tokenizer:
    """A tokenizer of transformers with its fingerprint.

    Raises:
        ModelInvalid: it is not a fast one, or it has no end-of-text token.
    """
    if not backend.is_fast:
        raise ModelInvalid(model=name, problem="the tokenizer has no fast form (tokenizer.json)")
    if backend.eos_token_id is None:
        raise ModelInvalid(model=name, problem="the tokenizer has no end-of-text token to close a document with")
    opening = backend("a")["input_ids"]
    bos = backend.bos_token_id
    bos_id = bos if bos is not None and opening[:1] == [bos] else None
    definition = json.loads(backend.backend_tokenizer.to_str())
    definition.pop("truncation", None)
    definition.pop("padding", None)
    parts = [definition, bos_id, backend.eos_token_id]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Tokenizer(
        backend=backend,
        fingerprint=fingerprint,
        vocab_size=len(backend),
        bos_id=bos_id,
        eos_id=backend.eos_token_id,
    )


def check_tokenizer(tokenizer: Tokenizer, *, model: str, data: str, data_fingerprint: str) -> None:
    """Refuse a model whose tokenizer is not the data's. Raises TokenizerMismatch."""
    if tokenizer.fingerprint != data_fingerprint:
        raise TokenizerMismatch(
            data=data, data_fingerprint=data_fingerprint, model=model, model_fingerprint=tokenizer.fingerprint
        )


def check_vocabulary(*, model: str, model_size: int, data: str, data_size: int) -> None:
    """Refuse a model that has no logit for some token of the data. Raises VocabularyMismatch."""
    if model_size < data_size:
        raise VocabularyMismatch(data=data, data_size=data_size, model=model, model_size=model_size)


def architecture_of(folder: Path) -> str:
    """Name of a model's class, by its config. Raises ModelInvalid."""
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures")
    except (OSError, ValueError) as error:
        raise ModelInvalid(model=str(folder), problem=f"its config.json cannot be read: {error}") from error
    if not names:
        raise ModelInvalid(model=str(folder), problem="its config.json names no architecture")
    return str(names[0])


def output_size(folder: Path) -> int:
    """Number of tokens that a model gives logits for, by its config, padding included. Raises ModelInvalid."""
    return int(_text_config(folder).vocab_size)


def check_context(folder: Path, *, context_tokens: int) -> None:
    """Refuse sequences that are longer than a model's positions. Raises ModelInvalid."""
    longest = getattr(_text_config(folder), "max_position_embeddings", None)
    if longest is not None and context_tokens > longest:
        problem = (
            f"has {longest} positions, `corpus.context_tokens` is {context_tokens}; lower it, or use another model"
        )
        raise ModelInvalid(model=str(folder), problem=problem)


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ModelInvalid(model=str(folder), problem=f"its config.json cannot be read: {error}") from error


def check_weights(folder: Path) -> list[Path]:
    """The files of a model folder's weights, by name, whose lengths are as they say; their content is not read.

    Raises:
        ModelInvalid: the folder holds no safetensors, lacks a shard that its index names, or one is cut off.
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


@lru_cache(maxsize=8)
def weights_digest(folder: Path) -> str:
    """SHA-256, in hex, of a model folder's config and weights (safetensors), in the order of their names.

    Raises:
        ModelInvalid: see `check_weights`.
    """
    files = check_weights(folder)
    digest = hashlib.sha256()
    for file in (folder / "config.json", *files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def resolve_device(device: str) -> str:
    """`auto` is `cuda` where torch sees one, else `cpu`; anything else is kept."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: DataType, *, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively (on a CPU: AVX-512 BF16), else float32."""
    import torch

    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.startswith("cuda") else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def _cpu_has_bf16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_model(folder: Path, *, dtype: torch.dtype, device: str) -> Any:
    """A frozen causal language model in evaluation mode.

    Raises:
        ModelInvalid: transformers cannot load it, or the device is not there.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_weights(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise ModelInvalid(model=str(folder), problem=f"cannot be loaded: {error}") from error
    model.requires_grad_(False)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise ModelInvalid(
            model=str(folder), problem=f"cannot be put on the device {device} ({error}); set `device: auto`"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's; torch tells the latter by the text of a RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory(device: str) -> None:
    """Give back to a device what nothing refers to any more; torch keeps it for this process otherwise."""
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
