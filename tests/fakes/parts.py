"""Parts that are built and committed as a run builds them, from random logits."""

from __future__ import annotations

import numpy as np
import torch

from softshard.config import FullSketch, NucleusSketch, ThresholdSketch, TopkSketch
from softshard.shard.card import write_card
from softshard.shard.commit import PartSpec, build_part, commit_part
from softshard.shard.manifest import Manifest, SourceRights, bytes_per_position, mean_fidelity, write_manifest
from softshard.sketch.fidelity import FidelitySums
from softshard.sketch.philox import tail_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import TokenSequence

VOCAB = 300
KINDS = {
    "threshold": ThresholdSketch(),
    "threshold with draws": ThresholdSketch(tau=1 / 12, draws=3),
    "topk": TopkSketch(kind="topk", k=16),
    "nucleus": NucleusSketch(kind="nucleus", mass=0.9),
    "full": FullSketch(kind="full"),
}


def some_rows(settings, *, num_sequences=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, total = [], FidelitySums()
    for index in range(num_sequences):
        length = 2 + 7 * index
        first_label = 1 if index % 2 == 0 else 2
        token_ids = torch.randint(0, VOCAB, (length,), generator=generator).numpy().astype(np.int32)
        sequence = TokenSequence(
            sequence_id=f"{seed:02d}{index:030d}",
            document_id=f"{index:032d}",
            source="tales",
            style="literary",
            group="someone",
            start=index,
            token_ids=token_ids,
            label_spans=((min(first_label, length - 1), length),),
        )
        logits = torch.randn(sequence.num_labels, VOCAB, generator=generator) * 2.5
        targets, fidelity = sketch_rows(
            logits,
            labels=torch.from_numpy(sequence.labels.astype(np.int64)),
            uniforms=tail_uniforms([sequence], seed=seed, draws=getattr(settings, "draws", 1)),
            settings=settings,
            vocab_size=VOCAB,
            places=[(sequence.sequence_id, j) for j in range(sequence.num_labels)],
        )
        rows.append((sequence, targets))
        total += fidelity
    return rows, total


def a_plan(settings, **changes):
    values = {
        "index": 0,
        "split": "train",
        "fold": 0,
        "slice": "a" * 64,
        "tokenizer_fingerprint": "f" * 64,
        "vocab_size": VOCAB,
        "teacher": {"engine": "transformers", "num_threads": 1},
        "sketch": settings,
        "seed": 0,
    }
    return PartSpec(**{**values, **changes})


def committed(store, settings=KINDS["threshold"], *, seeds=(0,)):
    receipts = []
    for index, seed in enumerate(seeds):
        rows, fidelity = some_rows(settings, seed=seed)
        split = "train" if index % 2 == 0 else "test"
        plan = a_plan(settings, index=index, split=split, slice=f"{seed:064d}")
        receipts.append(commit_part(store, *build_part(plan, rows, fidelity)))
    manifest = Manifest(
        schema_version=1,
        job="test",
        corpus="c" * 64,
        sources=(SourceRights(name="tales", style="literary", license="CC0-1.0", rights_basis="public-domain"),),
        tokenizer_fingerprint="f" * 64,
        vocab_size=VOCAB,
        context_tokens=64,
        overlap_tokens=2,
        target=settings.model_dump(mode="json"),
        seed=0,
        teacher={"engine": "transformers"},
        fidelity=mean_fidelity(receipts),
        bytes_per_position=bytes_per_position(receipts),
        parts=tuple(receipts),
    )
    write_manifest(store, manifest)
    write_card(store, manifest)
    return manifest
