"""One stored sequence, decoded for a reader: its text, and the stored target of each label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softshard.errors import SequenceUnknown
from softshard.models import Tokenizer, check_tokenizer, load_tokenizer, resolve_model
from softshard.output.workspace import saved_job
from softshard.shard.manifest import Manifest, Receipt, read_manifest
from softshard.shard.read import Row, read_rows
from softshard.shard.schema import PartMetadata
from softshard.sketch.entries import entries_of
from softshard.storage import Store, open_store

__all__ = ["ShownPosition", "ShownSequence", "show_sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPosition:
    """The stored target of one label."""

    place: int
    """Index of the label in the sequence's tokens."""
    label: str
    label_probability: float
    entropy_nats: float
    tail_mass: float
    head: tuple[tuple[str, float], ...]
    """Tokens of the head with their probabilities, by falling probability."""
    tail: tuple[str, ...]
    """Tokens that were sampled from the tail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSequence:
    """A sequence and its positions."""

    sequence_id: str
    document_id: str
    source: str
    style: str
    group: str
    part: str
    split: str
    fold: int
    kind: str
    tail_weight: float | None
    text: str
    positions: tuple[ShownPosition, ...]


def show_sequence(out: str, sequence_id: str) -> ShownSequence:
    """The first stored sequence whose id starts with `sequence_id`.

    Raises:
        SequenceUnknown: no part holds such a sequence.
        ManifestMissing: the targets are not complete.
    """
    store = open_store(out)
    targets = store.below("targets")
    manifest = read_manifest(targets)
    job = saved_job(store)
    folder = resolve_model(job.teacher.model, revision=job.teacher.revision)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model=str(folder), data=out, data_fingerprint=manifest.tokenizer_fingerprint)
    receipt, row, metadata = _find(targets, manifest, sequence_id, out=out)
    sequence, _ = row
    return ShownSequence(
        sequence_id=sequence.sequence_id,
        document_id=sequence.document_id,
        source=sequence.source,
        style=sequence.style,
        group=sequence.group,
        part=receipt.path,
        split=receipt.split,
        fold=receipt.fold,
        kind=metadata.kind,
        tail_weight=metadata.tau,
        text=tokenizer.decode(sequence.token_ids.tolist()),
        positions=tuple(_positions(row, metadata, tokenizer)),
    )


def _find(targets: Store, manifest: Manifest, sequence_id: str, *, out: str) -> tuple[Receipt, Row, PartMetadata]:
    for receipt in manifest.parts:
        for row, metadata in read_rows(targets, receipt):
            if row[0].sequence_id.startswith(sequence_id):
                return receipt, row, metadata
    raise SequenceUnknown(sequence_id=sequence_id, out=out)


def _positions(row: Row, metadata: PartMetadata, tokenizer: Tokenizer) -> Iterator[ShownPosition]:
    sequence, targets = row
    entries = entries_of(targets, tau=metadata.tau)
    words = {token: tokenizer.decode([token]) for token in np.unique(np.append(entries.ids, sequence.labels)).tolist()}
    for j, (place, label) in enumerate(zip(sequence.label_indices.tolist(), sequence.labels.tolist(), strict=True)):
        start, stop = int(entries.offsets[j]), int(entries.offsets[j + 1])
        middle = start + int(targets.head_count[j])
        yield ShownPosition(
            place=place,
            label=words[label],
            label_probability=float(np.exp(targets.label_logprob[j])),
            entropy_nats=float(targets.entropy[j]),
            tail_mass=float(targets.tail_mass[j]),
            head=tuple((words[int(entries.ids[i])], float(entries.weights[i])) for i in range(start, middle)),
            tail=tuple(words[int(entries.ids[i])] for i in range(middle, stop)),
        )
