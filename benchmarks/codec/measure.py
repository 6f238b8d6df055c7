"""How fast does one core encode and decode targets, and how many bytes do they take, beside other codecs?

Measured on the same logits of real prose, in one run, alternating, on one core. softshard goes from targets in memory
to the bytes of a part, and from there to entries, which a trainer needs; its bytes include tokens, entropies and names.
The others start from the most likely tokens; the choice of entries is never timed. DistillKit and Megatron-LM are
measured if DISTILLKIT and MEGATRON_LM name a checkout of arcee-ai/DistillKit and NVIDIA/Megatron-LM. DistillKit's
compressor is timed alone, from tensors to tensors, which favours it, and once more with its files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.codec.other_codecs import (
    Codec,
    DistillKit,
    DistillKitFile,
    Megatron,
    ParquetLists,
    TopEntries,
    megatron_modules,
)
from benchmarks.harness import Options, Positions, Result, interleaved, positions, require, say, say_table
from softshard.config import ThresholdSketch
from softshard.shard.commit import PartSpec, build_part
from softshard.shard.decode import decode_part
from softshard.shard.encode import encode_part
from softshard.sketch.codec import MASS_GRID, counts_to_offsets
from softshard.sketch.entries import Entries, entries_of
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import SequenceTargets, TokenSequence

_SKETCH = ThresholdSketch(tau=1 / 24)
_MOST = 128
"""Tokens of a label that DistillKit and Megatron-LM keep."""
_BLOCK = 512
_PACKED = 8192
"""Tokens of a packed sequence in DistillKit's README, which its trainer decodes in one call."""
_TOP_P = 0.95


class Softshard:
    """A whole part of the rows, as a run commits it."""

    title = "softshard tau=1/24"

    def __init__(
        self, rows: list[tuple[TokenSequence, SequenceTargets]], fidelity: FidelitySums, vocab_size: int
    ) -> None:
        plan = PartSpec(
            index=0,
            split="train",
            fold=-1,
            slice="0" * 64,
            tokenizer_fingerprint="0" * 64,
            vocab_size=vocab_size,
            teacher={"engine": "transformers", "num_threads": 1},
            sketch=_SKETCH,
            seed=0,
        )
        content, _ = build_part(plan, rows, fidelity)
        self._rows = rows
        self._metadata = decode_part(content, uri="part")[1]
        self.num_entries = fidelity.num_entries

    def encode(self) -> bytes:
        return encode_part(self._rows, fold=-1, metadata=self._metadata)

    def decode_targets(self, stored: bytes) -> list[SequenceTargets]:
        return [targets for _, targets in decode_part(stored, uri="part")[0]]

    def decode(self, stored: bytes) -> list[Entries]:
        return [entries_of(targets, tau=self._metadata.tau) for targets in self.decode_targets(stored)]

    def num_bytes(self, stored: bytes) -> int:
        return len(stored)

    def check(self, decoded: list[Entries]) -> None:
        pairs = list(zip((targets for _, targets in self._rows), decoded, strict=True))
        require(all(_same_ids(*pair) for pair in pairs), f"{self.title}: ids come back, label by label")
        require(
            all(_same_probabilities(*pair, step=self._metadata.step) for pair in pairs),
            f"{self.title}: head probabilities come back within half a step, normalisation aside, and their mass",
        )


def _same_ids(given: SequenceTargets, back: Entries) -> bool:
    counts = given.head_count + given.tail_count
    labels = np.arange(len(counts))
    expected = np.concatenate(
        [
            _keys(np.repeat(labels, given.head_count), given.head_ids),
            _keys(np.repeat(labels, given.tail_count), given.tail_ids),
        ]
    )
    found = _keys(np.repeat(labels, np.diff(back.offsets)), back.ids)
    return np.array_equal(np.diff(back.offsets), counts) and np.array_equal(np.sort(found), np.sort(expected))


def _keys(labels: NDArray[np.int64], ids: NDArray[np.int32]) -> NDArray[np.int64]:
    return labels << 32 | ids


def _same_probabilities(given: SequenceTargets, back: Entries, *, step: float) -> bool:
    """Half a step either way before normalisation: a label's ratios of weight to probability span a step at most."""
    within = np.arange(len(back.ids)) - np.repeat(back.offsets[:-1], np.diff(back.offsets))
    in_head = within < np.repeat(given.head_count, np.diff(back.offsets))
    weights, filled = back.weights[in_head].astype(np.float64), given.head_count > 0
    starts = counts_to_offsets(given.head_count)[:-1][filled]
    ratios = np.log(weights) - given.head_logprobs
    apart = np.maximum.reduceat(ratios, starts) - np.minimum.reduceat(ratios, starts)
    mass = np.add.reduceat(weights, starts) - (1 - given.tail_mass[filled])
    return bool(
        apart.max() <= step + 1e-5
        and np.abs(mass).max() <= MASS_GRID / 2 + 1e-6
        and (back.weights[~in_head] == np.float32(_SKETCH.tau)).all()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    rows: list[tuple[TokenSequence, SequenceTargets]]
    fidelity: FidelitySums
    top: TopEntries
    vocab_size: int


def _material(source: Positions) -> Material:
    """Everyone's entries of the same logits, a window at a time."""
    rows, fidelity, ids, logprobs = [], FidelitySums(), [], []
    noise = source.uniforms(seed=0, num_draws=1)
    ends = counts_to_offsets(np.array([sequence.num_labels for sequence in source.sequences], dtype=np.int32)).tolist()
    for sequence, (start, stop) in zip(source.sequences, pairwise(ends), strict=True):
        logits = source.logits(start, stop)
        targets, measured = sketch_rows(
            logits,
            labels=source.labels[start:stop],
            uniforms=noise[:, start:stop],
            settings=_SKETCH,
            vocab_size=source.vocab_size,
            places=source.places[start:stop],
        )
        most = torch.topk(logits, _MOST)
        rows.append((sequence, targets))
        fidelity += measured
        ids.append(most.indices)
        logprobs.append(most.values - torch.logsumexp(logits, 1, keepdim=True))
    return Material(
        rows=rows,
        fidelity=fidelity,
        top=TopEntries(ids=torch.cat(ids), logprobs=torch.cat(logprobs)),
        vocab_size=source.vocab_size,
    )


def _parquet_lists(material: Material, ours: Sequence[Entries]) -> dict[str, Codec]:
    counts = np.concatenate([np.diff(entries.offsets) for entries in ours]).astype(np.int32)
    (most,) = material.top.blocks(len(material.top.ids), k=64)
    return {
        "naive_threshold_": ParquetLists(
            "threshold",
            ids=np.concatenate([entries.ids for entries in ours]),
            probabilities=np.concatenate([entries.weights for entries in ours]),
            offsets=counts_to_offsets(counts).astype(np.int32),
        ),
        "naive_top_64_": ParquetLists(
            "top 64",
            ids=most.ids.int().flatten().numpy(),
            probabilities=most.logprobs.exp().flatten().numpy(),
            offsets=np.arange(0, most.ids.numel() + 1, 64, dtype=np.int32),
        ),
    }


def _distillkit(checkout: Path, material: Material, folder: Path) -> dict[str, Codec]:
    sys.path.append(str(checkout))
    make = partial(DistillKit, top=material.top, vocab_size=material.vocab_size)
    file = DistillKitFile(material.top, vocab_size=material.vocab_size, block=_BLOCK, folder=folder / "distillkit")
    return {
        "distillkit_": make(128, block=_BLOCK),
        "distillkit_budget_": make(50, block=_BLOCK),
        "distillkit_packed_": make(128, block=_PACKED),
        "distillkit_file_": file,
    }


def _megatron(checkout: Path, material: Material, folder: Path) -> dict[str, Codec]:
    make = partial(Megatron, megatron_modules(checkout), material.top, block=_BLOCK)
    return {
        "megatron_": make(top_p=None, folder=folder / "megatron"),
        "megatron_top_p_": make(top_p=_TOP_P, folder=folder / "megatron_top_p"),
    }


_CHECKOUTS: Mapping[str, Callable[[Path, Material, Path], dict[str, Codec]]] = {
    "DISTILLKIT": _distillkit,
    "MEGATRON_LM": _megatron,
}


def _from_checkouts(material: Material, folder: Path) -> tuple[dict[str, Codec], dict[str, str | None]]:
    """Codecs of the projects that are there, and the commits of their checkouts; a line for each that is not."""
    codecs: dict[str, Codec] = {}
    commits: dict[str, str | None] = {}
    for variable, make in _CHECKOUTS.items():
        if not (place := os.environ.get(variable)):
            say(f"{variable} names no checkout: left out")
            continue
        try:
            codecs |= make(Path(place), material, folder)
            commits[variable] = _commit(Path(place))
        except ImportError as error:
            say(f"{variable}={place}: left out, {error}")
    return codecs, commits


def _commit(checkout: Path) -> str | None:
    """None where the checkout is a plain copy of the files."""
    command = ["git", "--git-dir", str(checkout / ".git"), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _take_one_core() -> None:
    """Threads that a library starts all the same run on that core too, where the system can say so."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _measure_codecs(ours: Softshard, codecs: Mapping[str, Codec], *, num_labels: int, repeats: int) -> dict[str, float]:
    """Figures by name, a codec's prefix before each."""
    stored = {prefix: codec.encode() for prefix, codec in codecs.items()}
    for prefix, codec in codecs.items():
        codec.check(codec.decode(stored[prefix]))
    candidates: dict[str, Callable[[], object]] = {"decode_targets": partial(ours.decode_targets, stored[""])}
    for prefix, codec in codecs.items():
        candidates[f"{prefix}encode"] = codec.encode
        candidates[f"{prefix}decode"] = partial(codec.decode, stored[prefix])
    seconds = interleaved(candidates, repeats=repeats)
    figures = {f"{name}_positions_per_s": num_labels / taken for name, taken in seconds.items()}
    for prefix, codec in codecs.items():
        figures[f"{prefix}encode_entries_per_s"] = codec.num_entries / seconds[f"{prefix}encode"]
        figures[f"{prefix}decode_entries_per_s"] = codec.num_entries / seconds[f"{prefix}decode"]
        figures[f"{prefix}entries_per_position"] = codec.num_entries / num_labels
        figures[f"{prefix}bytes_per_position"] = codec.num_bytes(stored[prefix]) / num_labels
    return figures


def _ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """How many times as fast softshard is as DistillKit's compressor, and as that with its files, where they ran."""
    return {
        f"{way}_{what}_over_{other}": figures[f"{way}_{what}_per_s"] / figures[f"{other}_{way}_{what}_per_s"]
        for other in ("distillkit", "distillkit_file")
        for what in ("positions", "entries")
        for way in ("encode", "decode")
        if f"{other}_{way}_{what}_per_s" in figures
    }


def _say_figures(figures: Mapping[str, float], codecs: Mapping[str, Codec]) -> None:
    def row(prefix: str, codec: Codec) -> tuple[str, ...]:
        value = {name.removeprefix(prefix): number for name, number in figures.items() if name.startswith(prefix)}
        return (
            codec.title,
            f"{value['entries_per_position']:.1f}",
            f"{value['bytes_per_position']:.1f}",
            *(f"{value[f'{way}_positions_per_s'] / 1e3:,.0f}" for way in ("encode", "decode")),
            *(f"{value[f'{way}_entries_per_s'] / 1e6:,.1f}" for way in ("encode", "decode")),
        )

    say("a position: entries and bytes; one core: thousand positions, million entries a second")
    columns = ("", "entries", "bytes", "k/s in", "k/s out", "M/s in", "M/s out")
    say_table(columns, [row(*item) for item in codecs.items()])
    say(f"softshard to targets, not yet entries: {figures['decode_targets_positions_per_s'] / 1e3:,.0f} k/s out")


def measure(options: Options) -> Result:
    num_positions = 8_000 if options.quick else 24_000
    source = positions("small", num_positions=num_positions, cache=options.cache)
    _take_one_core()
    material = _material(source)
    with TemporaryDirectory() as folder:
        ours = Softshard(material.rows, material.fidelity, material.vocab_size)
        others, commits = _from_checkouts(material, Path(folder))
        lists = _parquet_lists(material, ours.decode(ours.encode()))
        codecs: dict[str, Any] = {"": ours, **others, **lists}
        figures = _measure_codecs(ours, codecs, num_labels=num_positions, repeats=7 if options.quick else 15)
    _say_figures(figures, codecs)
    return Result(
        figures={name: float(f"{value:.4g}") for name, value in (figures | _ratios(figures)).items()},
        details={
            "positions": num_positions,
            "sequences": len(material.rows),
            "vocab_size": material.vocab_size,
            "codecs": {prefix: codec.title for prefix, codec in codecs.items()},
            "checkouts": commits,
        },
    )
