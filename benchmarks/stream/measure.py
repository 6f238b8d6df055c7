"""How many positions per second does one core stream from parts to a training step's tensors, beside other loaders?

Sketches of real prose at tau=1/24. softshard reads its parts: bytes from disk, decompressed, decoded, shuffled, the
label mixed in, batches of 4,096 tokens. Other loaders, if installed, get the same rows and need not shuffle:
- "columns": the arrays of a part's columns, decoded batch by batch by softshard's functions. datasets streams the parts
  themselves; litdata and mosaicml-streaming keep the arrays in their own formats;
- "entries": the contents of a batch, with the label mixed in for one alpha, so that nothing is left to decode.

All batches are compared bit by bit first. The loaders alternate on one core and read warm data; times are CPU times of
all their threads, so that waiting does not count. It is checked that no loader takes fewer bytes on disk than
softshard.
Ratios are against the fastest of the loaders that read
- columns, in any setting: `over_best_other`, including one that stores them uncompressed, at three times the bytes;
- columns, in a setting that compresses them, which compares at about equal bytes: `over_best_compressed`;
- columns, in a setting that takes no more bytes than softshard: `over_best_as_small`;
- entries: `over_best_entries`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import Options, Positions, Result, interleaved, positions, require, say, say_table
from benchmarks.stream.other_loaders import Form, Loader, Stored, make_datasets, make_litdata, make_mosaic
from softshard.cli.memory import keep_freed_memory
from softshard.config import ThresholdSketch
from softshard.data.batch import Batch
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mixing import Mixing
from softshard.data.target_set import TargetSet
from softshard.shard.commit import PartSpec, build_part, commit_part
from softshard.shard.manifest import Manifest
from softshard.shard.schema import SCHEMA_VERSION
from softshard.sketch.codec import counts_to_offsets
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import LocalStore

_SKETCH = ThresholdSketch(tau=1 / 24)
_ALPHA = 0.5
_BATCH_TOKENS = 4096
_FORMS: tuple[Form, ...] = ("columns", "entries")
_MIXING = Mixing(alpha=_ALPHA, truncated="ghost")


class Softshard:
    title = "softshard"

    def __init__(self, targets: TargetSet) -> None:
        keep_freed_memory()
        self.num_bytes = sum(part.num_bytes for part in targets.manifest.parts)
        self._data = SoftLabelDataset(
            targets,
            seed=0,
            batch_tokens=_BATCH_TOKENS,
            shuffle_buffer=4096,
            alpha=_ALPHA,
            rank=0,
            world_size=1,
            prefetch=0,
        )

    def batches(self) -> Iterator[Batch]:
        return iter(self._data)


def _write_targets(source: Positions, folder: Path, *, num_parts: int) -> TargetSet:
    """The same sequences once a part, each time with other draws of the tails."""
    store, receipts = LocalStore(folder), []
    for number, (rows, sums) in enumerate(_drawn(source, num_parts)):
        plan = PartSpec(
            index=number,
            split="train",
            fold=-1,
            slice=f"{number:064d}",
            tokenizer_fingerprint="0" * 64,
            vocab_size=source.vocab_size,
            teacher={"engine": "transformers", "num_threads": 1},
            sketch=_SKETCH,
            seed=number,
        )
        receipts.append(commit_part(store, *build_part(plan, rows, sums)))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        job="stream",
        corpus="0" * 64,
        sources=(),
        tokenizer_fingerprint="0" * 64,
        vocab_size=source.vocab_size,
        context_tokens=512,
        overlap_tokens=64,
        target=_SKETCH.model_dump(mode="json"),
        seed=0,
        teacher={"engine": "transformers"},
        fidelity=None,
        bytes_per_position=None,
        parts=tuple(receipts),
    )
    return TargetSet(store=store, manifest=manifest)


def _drawn(
    source: Positions, num_draws: int
) -> Iterator[tuple[list[tuple[TokenSequence, SequenceTargets]], FidelitySums]]:
    """Rows of all sequences in one draw after the other, from one pass over the logits."""
    noise = source.uniforms(seed=0, num_draws=num_draws)
    ends = counts_to_offsets(np.array([sequence.num_labels for sequence in source.sequences], dtype=np.int32)).tolist()
    rows, sums = [], FidelitySums()
    for sequence, (start, stop) in zip(source.sequences, pairwise(ends), strict=True):
        targets, measured = sketch_rows(
            source.logits(start, stop),
            labels=source.labels[start:stop],
            uniforms=noise[:, start:stop],
            settings=_SKETCH,
            vocab_size=source.vocab_size,
            places=source.places[start:stop],
        )
        rows.append((sequence, targets))
        sums += measured
    for draw in range(num_draws):
        yield [(sequence, targets.of_draw(draw)) for sequence, targets in rows], sums


def _others(targets: TargetSet, folder: Path) -> dict[str, Loader]:
    """Loaders by the prefix of their figures; a line for each that is not installed."""
    files = [Path(targets.store.uri) / receipt.path for receipt in targets.manifest.parts]
    stored = Stored(files, mixing=_MIXING, batch_tokens=_BATCH_TOKENS)
    makers: dict[str, Callable[[], Loader]] = {"datasets_columns_": partial(make_datasets, stored)}
    for form in _FORMS:
        makers[f"mosaic_{form}_"] = partial(make_mosaic, stored, folder / f"mosaic_{form}", form=form)
        for name, compressed in (("litdata", True), ("litdata_raw", False)):
            place = folder / f"{name}_{form}"
            makers[f"{name}_{form}_"] = partial(make_litdata, stored, place, form=form, compressed=compressed)
    loaders = {}
    for prefix, make in makers.items():
        try:
            loaders[prefix] = make()
        except ImportError as error:
            say(f"{prefix.rstrip('_')}: left out, {error}")
    return loaders


def _sequences_in(batches: Iterable[Batch]) -> Counter[bytes]:
    """Digests of the sequences of some batches with all their targets."""
    seen: Counter[bytes] = Counter()
    for batch in batches:
        assert batch.attention_mask is not None, "these batches are padded"
        ids, length = batch.input_ids.numpy(), batch.input_ids.shape[1]
        labels = np.searchsorted(batch.positions.numpy(), np.arange(len(ids) + 1) * length)
        entries = batch.entry_offsets.numpy()[labels]
        for row in range(len(ids)):
            own, found = slice(labels[row], labels[row + 1]), slice(entries[row], entries[row + 1])
            digest = hashlib.blake2b(ids[row][batch.attention_mask[row].bool().numpy()].tobytes(), digest_size=16)
            digest.update((batch.positions[own] - row * length).numpy().tobytes())
            digest.update(batch.entry_offsets.diff()[own].numpy().tobytes())
            digest.update(batch.entry_ids[found].numpy().tobytes() + batch.entry_weights[found].numpy().tobytes())
            seen[digest.digest()] += 1
    return seen


def _ratios(figures: Mapping[str, float], others: Sequence[str]) -> dict[str, float]:
    """How many times as fast softshard is as the best of some of the others; nothing where there are none of them."""
    size = {prefix: figures[f"{prefix}bytes_per_position"] for prefix in others}
    columns = [prefix for prefix in others if prefix.endswith("columns_")]
    compared = {
        "over_best_other": columns,
        "over_best_compressed": [prefix for prefix in columns if "_raw_" not in prefix],
        "over_best_as_small": [prefix for prefix in columns if size[prefix] <= figures["bytes_per_position"]],
        "over_best_entries": [prefix for prefix in others if prefix.endswith("entries_")],
    }
    return {
        name: figures["positions_per_s"] / max(figures[f"{prefix}positions_per_s"] for prefix in prefixes)
        for name, prefixes in compared.items()
        if prefixes
    }


def _take_one_core() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _exhaust(loader: Loader) -> None:
    for _ in loader.batches():
        pass


def measure(options: Options) -> Result:
    num_positions, num_parts = (8_000, 2) if options.quick else (72_000, 4)
    source = positions("small", num_positions=num_positions, cache=options.cache)
    _take_one_core()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        targets = _write_targets(source, folder / "targets", num_parts=num_parts)
        ours = Softshard(targets)
        loaders: dict[str, Loader] = {"": ours, **_others(targets, folder)}
        expected = _sequences_in(ours.batches())
        require(expected.total() == len(source.sequences) * num_parts, "an epoch has each sequence of each part")
        for loader in loaders.values():
            require(_sequences_in(loader.batches()) == expected, f"{loader.title}: the same tensors, bit by bit")
            require(loader.num_bytes >= ours.num_bytes, f"{loader.title}: no fewer bytes than softshard")
        repeats = 5 if options.quick else 15
        seconds = interleaved(
            {prefix: partial(_exhaust, loader) for prefix, loader in loaders.items()},
            repeats=repeats,
            clock=time.process_time,
        )
    total = num_positions * num_parts
    figures = {f"{prefix}positions_per_s": total / taken for prefix, taken in seconds.items()}
    figures |= {f"{prefix}bytes_per_position": loader.num_bytes / total for prefix, loader in loaders.items()}
    columns = ("", "thousand positions/s", "bytes per position")
    say_table(
        columns,
        [
            (
                loader.title,
                f"{figures[f'{prefix}positions_per_s'] / 1e3:,.0f}",
                f"{figures[f'{prefix}bytes_per_position']:.1f}",
            )
            for prefix, loader in loaders.items()
        ],
    )
    figures |= _ratios(figures, [prefix for prefix in loaders if prefix])
    return Result(
        figures={name: float(f"{value:.4g}") for name, value in figures.items()},
        details={"positions": num_positions, "parts": num_parts, "batch_tokens": _BATCH_TOKENS, "alpha": _ALPHA},
    )
