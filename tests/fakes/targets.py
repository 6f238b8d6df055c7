"""Targets made by hand for the tests of training: a reference sketcher of its own, and parts in a folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from softshard.data.sparse_targets import SparseTargets
from softshard.shard.encode import encode_part
from softshard.shard.labels import needed_version
from softshard.shard.manifest import Manifest, Receipt
from softshard.shard.schema import Fidelity, PartMetadata
from softshard.sketch.types import SequenceTargets, TokenSequence
from softshard.storage import LocalStore

VOCAB = 50
STEP = 0.02
FIDELITY = Fidelity(
    mean_squared_error=0.0,
    gradient_angle_degrees=0.0,
    mean_kl_nats=None,
    mean_entries=1.0,
    mass_by_rank=None,
    num_ranked=0,
)


def sequence(name, token_ids, *, first_label=1, label_spans=None):
    return TokenSequence(
        sequence_id=name,
        document_id=f"document of {name}",
        source="hand",
        style="plain",
        group="nobody",
        start=0,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        label_spans=((first_label, len(token_ids)),) if label_spans is None else label_spans,
    )


def sparse_targets(*, entry_offsets, position_weights=None, **tensors):
    """Targets of a loss; without weights every position weighs 1."""
    if position_weights is None:
        position_weights = torch.ones(len(entry_offsets) - 1)
    return SparseTargets(entry_offsets=entry_offsets, position_weights=position_weights, **tensors)


def random_distributions(rng, count, *, vocab=VOCAB, spread=2.0):
    logits = rng.normal(size=(count, vocab)) * spread
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def sketch(distributions, labels, *, kind, rng, tau=1 / 8, k=5, mass=0.8):
    """One position after the other, in plain loops."""
    head_ids, head_logprobs, head_count, tail_ids, tail_count, tail_mass = [], [], [], [], [], []
    for p in distributions:
        ranked = sorted(range(len(p)), key=lambda token: (-p[token], token))
        if kind == "threshold":
            head = [token for token in ranked if p[token] >= tau]
        elif kind == "topk":
            head = ranked[:k]
        elif kind == "full":
            head = ranked
        else:
            head = ranked[: 1 + next(n for n in range(len(p)) if sum(p[t] for t in ranked[: n + 1]) >= mass)]
        tail = []
        if kind == "threshold":
            u, running = rng.random(), 0.0
            for token in range(len(p)):
                if p[token] < tau:
                    before, running = running, running + p[token]
                    if np.floor(running / tau + u) > np.floor(before / tau + u):
                        tail.append(token)
        head_ids += head
        head_logprobs += [np.log(p[token]) for token in head]
        head_count.append(len(head))
        tail_ids += tail
        tail_count.append(len(tail))
        tail_mass.append(max(0.0, 1 - sum(p[token] for token in head)))
    return SequenceTargets(
        label_logprob=np.log(distributions[np.arange(len(labels)), labels]).astype(np.float32),
        entropy=-(distributions * np.log(distributions)).sum(axis=1).astype(np.float32),
        tail_mass=np.array(tail_mass, dtype=np.float32),
        head_count=np.array(head_count, dtype=np.int32),
        tail_count=np.array(tail_count, dtype=np.int32),
        head_ids=np.array(head_ids, dtype=np.int32),
        head_logprobs=np.array(head_logprobs, dtype=np.float32),
        tail_ids=np.array(tail_ids, dtype=np.int32),
    )


def in_draws(drawn):
    """The tails of several sketches of the same distributions as draws over one head."""
    counts, ids = (np.concatenate([getattr(one, name) for one in drawn]) for name in ("tail_count", "tail_ids"))
    return replace(drawn[0], tail_count=counts, tail_ids=ids)


def row(name, length, rng, *, kind="threshold", first_label=1, label_spans=None, vocab=VOCAB, **settings):
    tokens = sequence(name, rng.integers(vocab, size=length), first_label=first_label, label_spans=label_spans)
    distributions = random_distributions(rng, tokens.num_labels, vocab=vocab)
    return tokens, sketch(distributions, tokens.labels, kind=kind, rng=rng, **settings)


def random_spans(rng, num_spans):
    """Runs of labels with context before, between and mostly after them, and a length for their sequence."""
    bounds = np.cumsum(rng.integers(1, 4, size=2 * num_spans))
    return tuple((int(start), int(stop)) for start, stop in bounds.reshape(-1, 2)), int(bounds[-1] + rng.integers(3))


def conversations(rng, count, *, kind="threshold", **settings):
    """Rows of one to four answers with context between them; the first row ends with context."""
    rows = []
    for number in range(count):
        spans, length = random_spans(rng, 1 + number % 4)
        length = max(length, spans[-1][1] + (number == 0))
        rows.append(row(f"{number:032d}", length, rng, kind=kind, label_spans=spans, **settings))
    return rows


def numbered_parts(rng, sizes, **settings):
    """Parts of so many rows; the first two tokens of each row spell its number through all parts."""
    parts, number = [], 0
    for size in sizes:
        rows = []
        for _ in range(size):
            tokens, targets = row(f"{number:032d}", int(rng.integers(4, 16)), rng, **settings)
            tokens.token_ids[0], tokens.token_ids[1] = divmod(number, VOCAB)
            rows.append((tokens, targets))
            number += 1
        parts.append(rows)
    return parts


def numbers_in(batch):
    """Numbers of the sequences of a batch; none for a batch of weight zero."""
    if not batch.position_weights.any():
        return ()
    rows = batch.input_ids
    if batch.cu_seq_lens is not None:
        starts = batch.cu_seq_lens[:-1].long()
        return tuple((rows[0, starts] * VOCAB + rows[0, starts + 1]).tolist())
    return tuple((rows[:, 0] * VOCAB + rows[:, 1]).tolist())


def metadata(kind="threshold", *, tau=1 / 8, draws=1, part_id="0" * 32, vocab=VOCAB, tokenizer="f" * 64, version=1):
    return PartMetadata(
        schema_version=version,
        part_id=part_id,
        kind=kind,
        tau=tau if kind == "threshold" else None,
        draws=draws,
        k=5 if kind == "topk" else None,
        nucleus_mass=0.8 if kind == "nucleus" else None,
        step=STEP,
        temperature=1.0,
        seed=0,
        tokenizer_fingerprint=tokenizer,
        vocab_size=vocab,
        teacher={"engine": "hand"},
        fidelity=FIDELITY,
    )


def receipt(part_id, path, content, *, num_sequences, split="train"):
    return Receipt(
        part_id=part_id,
        path=path,
        split=split,
        fold=0,
        slice="0" * 64,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        num_sequences=num_sequences,
        num_labels=1,
        num_head_entries=1,
        num_tail_entries=1,
        label_logprob_sum=-1.0,
        fidelity=FIDELITY,
    )


def manifest_of(receipts, *, kind="threshold", vocab=VOCAB, version=1):
    return Manifest(
        schema_version=version,
        job="hand",
        corpus="c" * 64,
        sources=(),
        tokenizer_fingerprint="f" * 64,
        vocab_size=vocab,
        context_tokens=64,
        overlap_tokens=1,
        target={"kind": kind, "temperature": 1.0},
        seed=0,
        teacher={"engine": "hand"},
        fidelity=FIDELITY,
        bytes_per_position=1.0,
        parts=tuple(receipts),
    )


def write_targets(root: Path, parts, *, kind="threshold", vocab=VOCAB, tokenizer="f" * 64):
    """Parts, each a list of rows, as files in a folder, with their manifest."""
    store, receipts = LocalStore(root), []
    version = needed_version(tokens for rows in parts for tokens, _ in rows)
    for number, rows in enumerate(parts):
        part_id = f"{number:032x}"
        described = metadata(kind, part_id=part_id, vocab=vocab, tokenizer=tokenizer, version=version)
        content = encode_part(rows, fold=0, metadata=described)
        path = f"data/train/part-{number:05d}-{part_id}.parquet"
        store.put_once(path, content)
        receipts.append(receipt(part_id, path, content, num_sequences=len(rows)))
    return store, manifest_of(receipts, kind=kind, vocab=vocab, version=version)
