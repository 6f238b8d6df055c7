"""The identity of a part, and the order in which it is committed.

The part's bytes are built, hashed and put once; then its receipt is created exclusively. A part without a receipt is
not committed: the next run computes it again, finds equal bytes and keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from softshard.config import SketchSettings
from softshard.errors import PartConflict
from softshard.records.canonical import canonical_json
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.shard.encode import encode_part
from softshard.shard.files import check_size
from softshard.shard.manifest import Receipt, read_receipt
from softshard.shard.schema import SCHEMA_VERSION, Fidelity, PartMetadata
from softshard.sketch.fidelity import RANKS, FidelitySums
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import Store

__all__ = ["PartSpec", "build_part", "commit_part", "find_receipt", "part_fidelity", "receipt_path"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """What a part is computed from: everything that can change its bytes."""

    index: int
    """Place in the corpus, which is only used in the file name."""
    split: Literal["train", "test"]
    fold: int
    """Style teacher that scores it; -1: all, averaged."""
    slice: str
    """SHA-256 of the slice of the corpus."""
    tokenizer_fingerprint: str
    vocab_size: int
    teacher: dict[str, str | int | float | list[str]]
    sketch: SketchSettings
    seed: int
    schema_version: int = SCHEMA_VERSION

    @property
    def part_id(self) -> str:
        """First 128 bits, in hex, of a SHA-256 of everything but the index."""
        return canonical_digest(
            {
                "schema_version": self.schema_version,
                "pyarrow": pa.__version__,
                "slice": self.slice,
                "split": self.split,
                "fold": self.fold,
                "tokenizer": self.tokenizer_fingerprint,
                "vocab_size": self.vocab_size,
                "teacher": self.teacher,
                "sketch": self.sketch,
                "seed": self.seed,
            }
        )[:32]

    @property
    def path(self) -> str:
        """Path of the part below `targets/`."""
        return f"data/{self.split}/part-{self.index:05d}-{self.part_id[:16]}.parquet"


def receipt_path(part_id: str) -> str:
    """Path of a receipt below `targets/`."""
    return f"receipts/{part_id}.json"


def find_receipt(store: Store, part_id: str) -> Receipt | None:
    """Receipt of a committed part whose file exists; None if the part has to be computed.

    Raises:
        PartCorrupt: the receipt cannot be read, or the part has another size than the receipt names.
    """
    receipt = _read_receipt(store, part_id)
    if receipt is None:
        return None
    try:
        size = store.size(receipt.path)
    except FileNotFoundError:
        return None
    check_size(size, expected=receipt.num_bytes, uri=f"{store.uri}/{receipt.path}")
    return receipt


def _read_receipt(store: Store, part_id: str) -> Receipt | None:
    try:
        return read_receipt(store, receipt_path(part_id))
    except FileNotFoundError:
        return None


def part_fidelity(sums: FidelitySums, *, covers_all: bool) -> Fidelity:
    """Means of sums over the labels of a part. `covers_all`: the sketch stores every token, so its KL is defined."""
    by_rank = {str(rank): getattr(sums, f"mass_{rank}") / max(sums.num_ranked, 1) for rank in RANKS}
    return Fidelity(
        mean_squared_error=sums.squared_error / sums.num_labels,
        gradient_angle_degrees=sums.angle_degrees / sums.num_labels,
        mean_kl_nats=sums.kl_nats / sums.num_labels if covers_all else None,
        mean_entries=sums.num_entries / sums.num_labels,
        mass_by_rank=by_rank if sums.num_ranked else None,
        num_ranked=sums.num_ranked,
    )


def build_part(
    spec: PartSpec, rows: Sequence[tuple[TokenSequence, SequenceTargets]], fidelity: FidelitySums
) -> tuple[bytes, Receipt]:
    """Encode a part; its bytes and its receipt. Raises ValueError for labels that the spec's version cannot hold."""
    labels = fidelity.num_labels
    measured = part_fidelity(fidelity, covers_all=spec.sketch.covers_vocabulary)
    metadata = PartMetadata(
        schema_version=spec.schema_version,
        part_id=spec.part_id,
        kind=spec.sketch.kind,
        tau=spec.sketch.tail_weight,
        draws=spec.sketch.num_draws,
        step=spec.sketch.step,
        temperature=spec.sketch.temperature,
        seed=spec.seed,
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        vocab_size=spec.vocab_size,
        teacher=spec.teacher,
        fidelity=measured,
        **spec.sketch.part_settings,
    )
    content = encode_part(rows, fold=spec.fold, metadata=metadata, encoding=spec.sketch.encoding)
    receipt = Receipt(
        part_id=spec.part_id,
        path=spec.path,
        split=spec.split,
        fold=spec.fold,
        slice=spec.slice,
        sha256=sha256_hex(content),
        num_bytes=len(content),
        num_sequences=len(rows),
        num_labels=labels,
        num_head_entries=sum(len(targets.head_ids) for _, targets in rows),
        num_tail_entries=sum(len(targets.tail_ids) for _, targets in rows),
        label_logprob_sum=float(sum(targets.label_logprob.sum(dtype="float64") for _, targets in rows)),
        fidelity=measured,
    )
    return content, receipt


def commit_part(store: Store, content: bytes, receipt: Receipt) -> Receipt:
    """Put the part, then its receipt. The first commit of a part wins, and its receipt is returned.

    Raises:
        PartConflict: a file of that name, or the part of an existing receipt, has other bytes.
        StorageFull: no space is left; nothing incomplete is visible.
    """
    there = _read_receipt(store, receipt.part_id)
    if there is not None and there.sha256 != receipt.sha256:
        uri = f"{store.uri}/{receipt_path(receipt.part_id)}"
        raise PartConflict(uri=uri, expected=receipt.sha256, actual=there.sha256)
    store.put_once((there or receipt).path, content)
    if there is None and not store.create_exclusive(receipt_path(receipt.part_id), canonical_json(receipt)):
        return commit_part(store, content, receipt)
    return there or receipt
