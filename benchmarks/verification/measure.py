"""How fast is `softshard verify` beside the disk and the hash, and `--deep` beside the codec?

1 GB of parts as a run leaves them, with receipts and a manifest, on the disk of the folder for temporary files. Before
the disk is read and before parts are verified, they are dropped from the page cache. The hash is SHA-256 of the same
bytes in memory; the codec decodes whole parts. The targets are random: the shape and the number of entries are those of
threshold sampling at tau = 1/24, and no figure depends on their values.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.harness import Options, Result, interleaved, require, say, say_table
from softshard.config import ThresholdSketch
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.commit import PartSpec, build_part, receipt_path
from softshard.shard.decode import decode_part
from softshard.shard.manifest import Manifest, Receipt, bytes_per_position, mean_fidelity, write_manifest
from softshard.shard.verify import verify_targets
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import LocalStore

_SKETCH = ThresholdSketch(tau=1 / 24)
_VOCAB, _ROWS, _TOKENS, _FIRST_LABEL = 49_152, 256, 512, 64
_FULL_BYTES, _QUICK_BYTES, _DEEP_BYTES = 10**9, 10**8, 2 * 10**7


def _rows(generator: np.random.Generator) -> list[tuple[TokenSequence, SequenceTargets]]:
    """Rows of one part; the ids of a label are distinct, being runs of a permutation of the vocabulary."""
    return [_row(generator, generator.permutation(_VOCAB).astype(np.int32)) for _ in range(_ROWS)]


def _row(generator: np.random.Generator, ids: NDArray[np.int32]) -> tuple[TokenSequence, SequenceTargets]:
    labels = _TOKENS - _FIRST_LABEL
    tail_mass = generator.beta(2, 2, labels)
    heads = generator.integers(1, 6, labels).astype(np.int32)
    tails = np.rint(tail_mass * 24).astype(np.int32)
    starts = generator.integers(0, _VOCAB - 64, labels)
    head_ids = np.concatenate([ids[start : start + count] for start, count in zip(starts, heads, strict=True)])
    tail_ids = np.concatenate([ids[start + 8 : start + 8 + count] for start, count in zip(starts, tails, strict=True)])
    logprobs = np.concatenate([-np.sort(generator.exponential(1, count)) for count in heads])
    sequence = TokenSequence(
        sequence_id=generator.bytes(16).hex(),
        document_id=generator.bytes(16).hex(),
        source="drawn",
        style="plain",
        group="nobody",
        start=0,
        token_ids=generator.integers(0, _VOCAB, _TOKENS).astype(np.int32),
        label_spans=((_FIRST_LABEL, _TOKENS),),
    )
    targets = SequenceTargets(
        label_logprob=-generator.exponential(3, labels).astype(np.float32),
        entropy=(6 * generator.random(labels)).astype(np.float32),
        tail_mass=tail_mass.astype(np.float32),
        head_count=heads,
        tail_count=tails,
        head_ids=head_ids,
        head_logprobs=logprobs.astype(np.float32),
        tail_ids=tail_ids,
    )
    return sequence, targets


def _write(root: Path, content: bytes, receipt: Receipt, *, num_bytes: int) -> Manifest:
    """So many bytes of parts, each with an id of its own in its metadata, with their receipts and their manifest."""
    store, receipts = LocalStore(root), []
    for number in range(max(2, num_bytes // len(content))):
        part_id = f"{number:032x}"
        other = content.replace(receipt.part_id.encode(), part_id.encode())
        path = f"data/train/part-{number:05d}-{part_id[:16]}.parquet"
        changes = {"part_id": part_id, "path": path, "sha256": sha256_hex(other)}
        receipts.append(receipt.model_copy(update=changes))
        store.put_once(path, other)
        store.put_once(receipt_path(part_id), canonical_json(receipts[-1]))
    manifest = Manifest.model_validate(
        {
            "schema_version": 1,
            "job": "drawn",
            "corpus": "c" * 64,
            "sources": (),
            "tokenizer_fingerprint": "f" * 64,
            "vocab_size": _VOCAB,
            "context_tokens": _TOKENS,
            "overlap_tokens": _FIRST_LABEL,
            "target": _SKETCH.model_dump(mode="json"),
            "seed": 0,
            "teacher": {"engine": "drawn"},
            "fidelity": mean_fidelity(receipts),
            "bytes_per_position": bytes_per_position(receipts),
            "parts": receipts,
        }
    )
    write_manifest(store, manifest)
    return manifest


def _forget(root: Path) -> None:
    """Have the kernel drop what it keeps of the parts."""
    for path in (root / "data").rglob("*.parquet"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _after_forgetting(root: Path, action: Callable[[], object]) -> Callable[[], object]:
    def both() -> None:
        _forget(root)
        action()

    return both


def measure(options: Options) -> Result:
    pa.set_cpu_count(1)
    plan = PartSpec(
        index=0,
        split="train",
        fold=0,
        slice="a" * 64,
        tokenizer_fingerprint="f" * 64,
        vocab_size=_VOCAB,
        teacher={"engine": "drawn"},
        sketch=_SKETCH,
        seed=0,
    )
    rows = _rows(np.random.default_rng(0))
    fidelity = FidelitySums(num_labels=sum(sequence.num_labels for sequence, _ in rows), num_entries=1)
    content, receipt = build_part(plan, rows, fidelity)
    with tempfile.TemporaryDirectory(prefix="softshard-verify-") as folder:
        whole, few = Path(folder, "whole"), Path(folder, "few")
        total = _write(whole, content, receipt, num_bytes=_QUICK_BYTES if options.quick else _FULL_BYTES)
        sample = _write(few, content, receipt, num_bytes=_DEEP_BYTES)
        require(not verify_targets(LocalStore(few), deep=True).problems, "the parts verify in depth")
        paths = [whole / part.path for part in total.parts]
        decoded = [(few / part.path).read_bytes() for part in sample.parts]
        store, repeats = LocalStore(whole), 3 if options.quick else 5
        seconds = interleaved(
            {
                "forget": lambda: _forget(whole),
                "disk": _after_forgetting(whole, lambda: [path.read_bytes() for path in paths]),
                "verify": _after_forgetting(whole, lambda: verify_targets(store)),
                "hash": lambda: [hashlib.sha256(one).digest() for one in decoded],
                "codec": lambda: [decode_part(one, uri="part") for one in decoded],
                "deep": lambda: verify_targets(LocalStore(few), deep=True),
            },
            repeats=repeats,
        )
    return _result(seconds, num_bytes=sum(part.num_bytes for part in total.parts), sample=sum(map(len, decoded)))


def _result(seconds: dict[str, float], *, num_bytes: int, sample: int) -> Result:
    forgetting = seconds.pop("forget")
    speeds = {
        "disk": num_bytes / (seconds["disk"] - forgetting),
        "hash": sample / seconds["hash"],
        "verify": num_bytes / (seconds["verify"] - forgetting),
        "codec": sample / seconds["codec"],
        "deep": sample / seconds["deep"],
    }
    say_table(["", "MB/s"], [(name, f"{speed / 1e6:,.1f}") for name, speed in speeds.items()])
    say(f"{num_bytes:,} bytes of parts; decoded: {sample:,}")
    figures = {f"{name}_mb_per_second": round(speed / 1e6, 2) for name, speed in speeds.items()}
    figures["verify_over_slower_of_disk_and_hash"] = round(speeds["verify"] / min(speeds["disk"], speeds["hash"]), 3)
    figures["deep_over_codec"] = round(speeds["deep"] / speeds["codec"], 3)
    return Result(figures=figures, details={"bytes_of_parts": num_bytes, "bytes_decoded": sample})
