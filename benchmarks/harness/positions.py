"""Real prose under real models: the hidden state of the position before each label, one product away from its logits.

In: the models and the text that `jobs/materials.py` puts into a cache folder. Out: the first N positions of that text.
Hidden states are kept in the cache. Windows are scored one at a time, so that their states do not depend on how many
windows are requested.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softshard.corpus.screen import ScreenedDocument, make_document_id
from softshard.corpus.tokenize import encode_texts
from softshard.corpus.windows import document_windows
from softshard.errors import JobInvalid, ModelInvalid
from softshard.models import Tokenizer, load_model, load_tokenizer
from softshard.models.decoder import PLAIN_LOGITS, Decoder
from softshard.sketch.philox import tail_uniforms
from softshard.sketch.types import TokenSequence

__all__ = ["ModelName", "Positions", "middle_states", "positions"]

ModelName = Literal["small", "large"]

_MODELS: Mapping[ModelName, tuple[str, str]] = {
    "small": ("SmolLM2-135M-Instruct", "benchmarks"),
    "large": ("Qwen2.5-Coder-0.5B-Instruct", "large-model"),
}
"""Folder in the cache, and the name by which materials.py makes it."""
_TEXT = ("speeches.jsonl", "benchmarks")
_CONTEXT_TOKENS = 512
_OVERLAP_TOKENS = 64
_WINDOWS_OF_BLOCK = 8
"""Windows whose states are one file of the cache."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The first positions of the text, in its order; row i is the position before label i."""

    states: Tensor
    """[N, D] float32 hidden states, after the last norm."""
    output: Tensor
    """[V, D] float32 output matrix, without its padding."""
    sequences: list[TokenSequence]
    """Windows of 512 tokens that overlap by 64; the last one is cut where N labels are reached."""

    @property
    def vocab_size(self) -> int:
        """V, the tokens of the tokenizer."""
        return len(self.output)

    @cached_property
    def labels(self) -> Tensor:
        """[N] int64."""
        return torch.from_numpy(np.concatenate([sequence.labels for sequence in self.sequences]).astype(np.int64))

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """[N] sequence id and position of each row."""
        return [(s.sequence_id, position) for s in self.sequences for position in s.positions.tolist()]

    def logits(self, start: int, stop: int) -> Tensor:
        """[stop - start, V] float32."""
        return self.states[start:stop] @ self.output.T

    def uniforms(self, *, seed: int, num_draws: int) -> NDArray[np.float64]:
        """[num_draws, N] numbers in [0, 1), those that a run with this seed gives these labels."""
        return tail_uniforms(self.sequences, seed=seed, draws=num_draws)


def positions(model: ModelName, *, num_positions: int, cache: Path) -> Positions:
    """Positions of the speeches under a model.

    Raises:
        JobInvalid: the cache lacks the model or the text, or the text has fewer positions.
    """
    folder = _material(*_MODELS[model], cache)
    blocks = _blocks(folder, cache, num_positions)
    return Positions(
        states=_cached_states(folder, blocks, layer=None)[:num_positions],
        output=_output_matrix(folder)[: load_tokenizer(folder).vocab_size].clone(),
        sequences=_first([window for block in blocks for window in block], num_positions),
    )


def middle_states(model: ModelName, *, layer: int, num_positions: int, cache: Path) -> Tensor:
    """[N, D] float32 hidden states after the first `layer` layers, at the same positions. Raises JobInvalid."""
    folder = _material(*_MODELS[model], cache)
    return _cached_states(folder, _blocks(folder, cache, num_positions), layer=layer)[:num_positions]


def _material(file: str, name: str, cache: Path) -> Path:
    if not (cache / f"{file}.stamp").is_file():
        problem = f"is not there; make it with: python jobs/materials.py {name} --cache {cache}"
        raise JobInvalid(file=str(cache / file), place="", problem=problem)
    return cache / file


def _blocks(folder: Path, cache: Path, num_positions: int) -> list[list[TokenSequence]]:
    """Whole windows from the beginning of the text, block by block, until they have so many labels."""
    text = _material(*_TEXT, cache)
    windows = _windows(text, load_tokenizer(folder))
    blocks: list[list[TokenSequence]] = []
    num_labels = 0
    while num_labels < num_positions:
        block = list(itertools.islice(windows, _WINDOWS_OF_BLOCK))
        if not block:
            problem = f"has {num_labels} positions, {num_positions} were asked for"
            raise JobInvalid(file=str(text), place="", problem=problem)
        blocks.append(block)
        num_labels += sum(window.num_labels for window in block)
    return blocks


def _windows(text: Path, tokenizer: Tokenizer) -> Iterator[TokenSequence]:
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    for row, token_ids in zip(rows, encode_texts([row["text"] for row in rows], tokenizer=tokenizer), strict=True):
        document = ScreenedDocument(
            document_id=make_document_id(row["text"]),
            name=row["id"],
            text=row["text"],
            num_bytes=len(row["text"].encode()),
            source="speeches",
            style="spoken",
            group=row["group"],
            split="train",
            fold=-1,
        )
        yield from document_windows(
            document,
            token_ids=token_ids,
            tokenizer=tokenizer,
            context_tokens=_CONTEXT_TOKENS,
            overlap_tokens=_OVERLAP_TOKENS,
        )


def _first(windows: Sequence[TokenSequence], num_positions: int) -> list[TokenSequence]:
    """The windows of the first labels, the last one cut."""
    kept: list[TokenSequence] = []
    left = num_positions
    for window in windows:
        if left > 0:
            ((start, stop),) = window.label_spans
            stop = min(start + left, stop)
            kept.append(replace(window, token_ids=window.token_ids[:stop], label_spans=((start, stop),)))
            left -= stop - start
    return kept


def _cached_states(folder: Path, blocks: Sequence[Sequence[TokenSequence]], *, layer: int | None) -> Tensor:
    files = [folder.parent / "states" / f"{_digest(folder, block, layer)}.safetensors" for block in blocks]
    if missing := [index for index, file in enumerate(files) if not file.is_file()]:
        print(f"{folder.name}: scoring {sum(len(blocks[index]) for index in missing)} windows, once", flush=True)
        decoder = _decoder(folder, layer)
        for index in missing:
            _write_states(files[index], decoder, blocks[index])
    return torch.cat([load_file(file)["states"] for file in files])


def _digest(folder: Path, block: Sequence[TokenSequence], layer: int | None) -> str:
    """Changes whenever the states of a block may. A stamp holds the checksums of a whole model folder."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    stamp = folder.with_name(f"{folder.name}.stamp").read_text(encoding="utf-8")
    tokens = hashlib.sha256(b"".join(window.token_ids.tobytes() for window in block)).hexdigest()
    parts = [stamp, versions, layer, tokens, [(len(window.token_ids), window.label_spans[0][0]) for window in block]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _decoder(folder: Path, layer: int | None) -> Decoder:
    model = load_model(folder, dtype=torch.float32, device="cpu")
    decoder = Decoder.of(model)
    more = decoder.bias is not None or decoder.transform != PLAIN_LOGITS
    if more or not torch.equal(decoder.weight, _output_matrix(folder)):
        raise ModelInvalid(model=str(folder), problem="its output layer is more than the output matrix of its file")
    if layer is not None:
        model.model.layers = model.model.layers[:layer]
        model.model.norm = nn.Identity()
    return decoder


@torch.inference_mode()
def _write_states(file: Path, decoder: Decoder, block: Sequence[TokenSequence]) -> None:
    states = torch.cat([decoder.hidden_states([window]) for window in block])
    file.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        whole = Path(folder) / file.name
        save_file({"states": states}, whole)
        whole.replace(file)


def _output_matrix(folder: Path) -> Tensor:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        name = "lm_head.weight" if "lm_head.weight" in weights.keys() else "model.embed_tokens.weight"  # noqa: SIM118
        matrix: Tensor = weights.get_tensor(name)
    return matrix
