"""Whether what is on the disk is what the manifest and the receipts say.

Every part is read again, hashed, and counted from its Parquet metadata; `deep` decodes every sketch and checks its
mass. Findings are collected, not raised, so that one bad part does not hide another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from softshard.errors import ManifestMissing, PartCorrupt
from softshard.shard.commit import receipt_path
from softshard.shard.encode import decode_batch, open_part
from softshard.shard.manifest import Manifest, Receipt, canonical_json, read_manifest
from softshard.shard.read import read_checked
from softshard.shard.schema import PartMetadata
from softshard.storage import Store
from softshard.target.codec import LOGPROB_GRID, mass_grid
from softshard.target.entries import entries_of
from softshard.target.types import SequenceTargets, TokenSequence

__all__ = ["Verification", "verify_targets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was looked at, and what is wrong."""

    num_parts: int
    num_sequences: int
    num_labels: int
    num_bytes: int
    deep: bool
    problems: tuple[str, ...]
    """One line each; empty: all is as it claims."""
    unnamed: tuple[str, ...]
    """Files that the manifest does not name, of earlier settings or of a run that was stopped; no reader opens them."""


def verify_targets(
    store: Store, *, deep: bool = False, on_part: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Verify a `targets/` folder against its manifest, or, before there is one, against its receipts."""
    manifest: Manifest | None = None
    problems: list[str] = []
    try:
        manifest = read_manifest(store)
    except ManifestMissing as error:
        problems.append(str(error))
    except PartCorrupt as error:
        problems.append(str(error))
    receipts = list(manifest.parts) if manifest else _receipts(store, problems)
    for done, receipt in enumerate(receipts):
        on_part(done, len(receipts))
        problems += _check_receipt(store, receipt)
        problems += _check_part(store, receipt, manifest, deep=deep)
    on_part(len(receipts), len(receipts))
    named = {receipt.path for receipt in receipts} | {receipt_path(receipt.part_id) for receipt in receipts}
    if manifest:
        named.add(f"manifests/{manifest.digest}.json")
    found = [path for folder in ("data", "receipts", "manifests") for path in store.list(folder)]
    return Verification(
        num_parts=len(receipts),
        num_sequences=sum(receipt.num_sequences for receipt in receipts),
        num_labels=sum(receipt.num_labels for receipt in receipts),
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        deep=deep,
        problems=tuple(problems),
        unnamed=tuple(path for path in found if path not in named),
    )


def _receipts(store: Store, problems: list[str]) -> list[Receipt]:
    receipts = []
    for path in store.list("receipts"):
        try:
            receipts.append(Receipt.model_validate_json(store.read(path)))
        except ValueError:
            problems.append(f"{store.uri}/{path}: is not a receipt; remove it and run the job again")
    return receipts


def _check_receipt(store: Store, receipt: Receipt) -> list[str]:
    path = receipt_path(receipt.part_id)
    if not store.exists(path):
        return [f"{store.uri}/{path}: the receipt is missing; run the job again"]
    if store.read(path) != canonical_json(receipt):
        return [f"{store.uri}/{path}: the receipt is not the one that the manifest names; run the job again"]
    return []


def _check_part(store: Store, receipt: Receipt, manifest: Manifest | None, *, deep: bool) -> list[str]:
    uri = f"{store.uri}/{receipt.path}"
    try:
        content = read_checked(store, receipt)
        file, metadata = open_part(content, uri=uri)
        problems = []
        if metadata.part_id != receipt.part_id:
            problems.append(f"{uri}: says it is part {metadata.part_id}, its receipt says {receipt.part_id}")
        if manifest:
            problems += [f"{uri}: {problem}" for problem in _check_metadata(metadata, manifest)]
        lengths = file.read(columns=["label_logprob"]).column(0)
        labels = len(lengths.combine_chunks().flatten())
        if (file.metadata.num_rows, labels) != (receipt.num_sequences, receipt.num_labels):
            seen, said = (
                f"{file.metadata.num_rows} rows and {labels} labels",
                f"{receipt.num_sequences} and {receipt.num_labels}",
            )
            problems.append(f"{uri}: has {seen}, its receipt says {said}")
        if deep:
            for batch in file.iter_batches(batch_size=64):
                for sequence, targets in decode_batch(batch, metadata=metadata, uri=uri):
                    problem = _check_values(sequence, targets, metadata) or _check_entries(targets, metadata)
                    problems += [f"{uri}: sequence {sequence.sequence_id}: {problem}"] if problem else []
    except PartCorrupt as error:
        return [str(error)]
    return problems


def _check_metadata(metadata: PartMetadata, manifest: Manifest) -> list[str]:
    problems = []
    for name in ("tokenizer_fingerprint", "vocab_size", "seed"):
        if getattr(metadata, name) != getattr(manifest, name):
            problems.append(f"its {name.replace('_', ' ')} is not the manifest's")
    for name in ("kind", "tau", "draws", "k", "step", "temperature"):
        if name in manifest.target and getattr(metadata, name) != manifest.target[name]:
            problems.append(f"has {name} {getattr(metadata, name)}, the manifest says {manifest.target[name]}")
    return problems


def _check_values(sequence: TokenSequence, targets: SequenceTargets, metadata: PartMetadata) -> str | None:
    """What no target can be, apart from its entries; None: nothing."""
    if not 0 <= int(sequence.token_ids.min()) <= int(sequence.token_ids.max()) < metadata.vocab_size:
        return "a token of the text lies outside the vocabulary"
    if not (targets.label_logprob <= 0).all() or not np.isfinite(targets.label_logprob).all():
        return "a label has a log-probability above 0, or none"
    most = np.log(metadata.vocab_size) + LOGPROB_GRID
    if not ((targets.entropy >= 0) & (targets.entropy <= most)).all():
        return "an entropy is not one of a distribution over the vocabulary"
    return None


def _check_entries(targets: SequenceTargets, metadata: PartMetadata) -> str | None:
    """What is wrong with the entries of a sequence's sketches and with their masses; None: nothing."""
    tau, mass_outside, headless = metadata.tau, targets.tail_mass.astype(np.float64), targets.head_count == 0
    right = (mass_outside >= 0) & (mass_outside <= 1) & (~headless | (mass_outside == 1))
    for draw in range(targets.draws):
        entries, counts = entries_of(targets, tau=tau, draw=draw), targets.of_draw(draw).tail_count
        labels = np.repeat(np.arange(targets.num_labels, dtype=np.int64), np.diff(entries.offsets))
        if len(np.unique(labels * metadata.vocab_size + entries.ids)) != len(entries.ids):
            return "a label holds a token twice"
        mass = np.bincount(labels, weights=entries.weights.astype(np.float64), minlength=targets.num_labels)
        expected = np.where(headless, 0.0, 1 - mass_outside) + counts * (tau or 0.0)
        right &= np.abs(mass - expected) <= 1e-5
        if tau is None:
            right &= counts == 0
        else:
            right &= np.abs(counts * tau - mass_outside) <= tau + mass_grid(tau)
    return f"{int((~right).sum())} label(s) have a mass that is not 1" if not right.all() else None
