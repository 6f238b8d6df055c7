"""What several runs' targets would give together: interleaved (mix), or combined sequence by sequence (blend).

In: output folders and weights. Out: how many tokens of each style would be trained on, and whether the targets hold the
same sequences. Only footers and small columns of the parts are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from softshard.errors import BlendInvalid, CorpusEmpty, JobInvalid
from softshard.shard.labels import num_tokens
from softshard.shard.manifest import Manifest, Receipt, read_manifest
from softshard.shard.read import open_committed
from softshard.shard.schema import LABEL_COLUMNS
from softshard.storage import Store, open_store

__all__ = ["BlendSummary", "SetShare", "summarize_blend"]

_GHOSTS = "`truncated: renormalise`, or alpha 1: the ghost tokens of two teachers cannot be combined"
_COLUMNS = ["sequence_id", "style", "mean_entropy", "mean_label_logprob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetShare:
    """The train split of one run, and its part in a mix and in a blend."""

    uri: str
    kind: str
    share: float
    num_sequences: int
    num_tokens: int
    times_seen: float
    """How often each of its sequences is seen on average in one epoch of the mix."""
    num_missing: int
    """Sequences of the other sets that it lacks; a blend needs 0."""
    mean_entropy_nats: float
    """Over labels."""
    mean_label_logprob_nats: float
    """Over labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendSummary:
    """What several target sets give together."""

    sets: tuple[SetShare, ...]
    num_tokens: int
    """Tokens of all sets, which make up an epoch of their mix."""
    tokens_by_style: dict[str, int]
    """Of an epoch of the mix."""
    num_common: int
    """Sequences that all sets hold."""
    can_mix: bool
    """Whether their targets have the same temperature, as a mix and a blend need."""
    can_blend: bool
    """Whether they can be blended, under the condition in `needs`."""
    needs: str | None
    """Condition for a blend; None: no condition."""
    blend_entropy_nats: float | None
    """Mean of the sets' mean entropies by share, a lower bound of their blend's entropy; None if there is no blend."""


def summarize_blend(outs: Sequence[str], *, weights: Sequence[float] | None = None) -> BlendSummary:
    """What the train splits of some outputs give together; without `weights` all have the same weight.

    Raises:
        JobInvalid: the weights are not one number above 0 for each output.
        ManifestMissing: an output's targets are not complete.
        BlendInvalid: they have different tokenizers.
        CorpusEmpty: an output has no train split.
        PartCorrupt: a part is missing or unreadable.
    """
    given = [1.0] * len(outs) if weights is None else list(weights)
    if len(given) != len(outs) or not all(0 < weight < float("inf") for weight in given):
        problem = f"{given} must be one number above 0 for each of {len(outs)} outputs"
        raise JobInvalid(file="softshard blend", place="--weights", problem=problem)
    stores = [open_store(out).below("targets") for out in outs]
    manifests = [read_manifest(store) for store in stores]
    for store, manifest in zip(stores, manifests, strict=True):
        if manifest.tokenizer_fingerprint != manifests[0].tokenizer_fingerprint:
            problem = f"was made with tokenizer {manifest.tokenizer_fingerprint[:16]}"
            other = f"the first with {manifests[0].tokenizer_fingerprint[:16]}"
            raise BlendInvalid(uri=store.uri, problem=f"{problem}, {other}; they cannot be trained on together")
    tables = [_train_rows(store, manifest) for store, manifest in zip(stores, manifests, strict=True)]
    return _blending(stores, manifests, tables, [weight / sum(given) for weight in given])


def _blending(
    stores: Sequence[Store], manifests: Sequence[Manifest], tables: Sequence[pa.Table], shares: Sequence[float]
) -> BlendSummary:
    names = [np.array(table["sequence_id"].to_pylist(), dtype=np.str_) for table in tables]
    everyone, holders = np.unique(np.concatenate([np.unique(own) for own in names]), return_counts=True)
    tokens = [table["tokens"].to_numpy() for table in tables]
    total = sum(int(own.sum()) for own in tokens)
    sets = tuple(
        SetShare(
            uri=store.uri,
            kind=manifest.sketch.kind,
            share=share,
            num_sequences=table.num_rows,
            num_tokens=int(own.sum()),
            times_seen=share * total / int(own.sum()),
            num_missing=len(everyone) - len(np.unique(ids)),
            mean_entropy_nats=_mean(table, "mean_entropy"),
            mean_label_logprob_nats=_mean(table, "mean_label_logprob"),
        )
        for store, manifest, table, own, ids, share in zip(
            stores, manifests, tables, tokens, names, shares, strict=True
        )
    )
    styles: dict[str, float] = {}
    for target_set, table, own in zip(sets, tables, tokens, strict=True):
        for style, count in zip(table["style"].to_pylist(), own.tolist(), strict=True):
            styles[style] = styles.get(style, 0.0) + count * target_set.times_seen
    common = int((holders == len(tables)).sum())
    can_mix = len({manifest.sketch.temperature for manifest in manifests}) == 1
    can_blend = common == len(everyone) and len(sets) > 1 and can_mix
    ghosts = any(manifest.sketch.leaves_ghost for manifest in manifests)
    return BlendSummary(
        sets=sets,
        num_tokens=total,
        tokens_by_style={style: round(count) for style, count in sorted(styles.items())},
        num_common=common,
        can_mix=can_mix,
        can_blend=can_blend,
        needs=_GHOSTS if ghosts and can_blend else None,
        blend_entropy_nats=sum(s.share * s.mean_entropy_nats for s in sets) if can_blend else None,
    )


def _train_rows(store: Store, manifest: Manifest) -> pa.Table:
    """A row per sequence: its plain columns, and its numbers of tokens and labels."""
    receipts = manifest.of_split("train")
    if not receipts:
        raise CorpusEmpty(counts={"sequences": 0}, split="train")
    tables = [_part_rows(store, receipt) for receipt in receipts]
    if not any(table.num_rows for table in tables):
        raise CorpusEmpty(counts={"sequences": 0}, split="train")
    return pa.concat_tables(tables).combine_chunks()


def _part_rows(store: Store, receipt: Receipt) -> pa.Table:
    with open_committed(store, receipt) as (file, metadata):
        table = file.read(columns=[*_COLUMNS, "entropy", LABEL_COLUMNS[metadata.schema_version]])
    labels = table["entropy"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    counted = table.select(_COLUMNS).append_column("labels", pa.array(labels))
    return counted.append_column("tokens", pa.array(num_tokens(table)))


def _mean(table: pa.Table, column: str) -> float:
    return float(np.average(table[column].to_numpy().astype(np.float64), weights=table["labels"].to_numpy()))
