"""The rows of a split's parts: their number, lengths and row groups, and which of them pass a filter.

In: receipts and the store with their parts. Out: the index from which an epoch's order is computed. It is read from the
small columns of each part; row groups whose statistics rule out every row are not read. Sizes are checked against the
receipts here, hashes whenever rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softshard.data.filters import GroupWeights, RowFilter
from softshard.errors import PartCorrupt
from softshard.shard.labels import num_tokens
from softshard.shard.manifest import Receipt
from softshard.shard.read import open_committed
from softshard.shard.schema import LABEL_COLUMNS, PartMetadata
from softshard.storage import Store

__all__ = ["RowIndex", "index_rows"]

_SKETCH = ("kind", "tau", "draws", "k", "nucleus_mass", "step", "temperature")
_SETTINGS = ("schema_version", *_SKETCH, "tokenizer_fingerprint", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowIndex:
    """Rows of several parts, numbered consecutively in the order of the parts."""

    lengths: NDArray[np.int64]
    """[R] tokens of each row; 0 where its row group was not read."""
    passing: NDArray[np.bool_]
    """[R] rows that pass the filter."""
    groups: list[list[tuple[int, int]]]
    """First row number and one past the last, by part and row group."""
    names: NDArray[np.bytes_] | None
    """[R] sequence ids if requested, in which case every row group is read; else None."""
    factors: NDArray[np.float32] | None
    """[R] factors for the weights of each row's labels; None: all are 1."""
    metadata: PartMetadata
    """Of the first part; the others have the same version and sketch settings."""


def index_rows(
    store: Store,
    receipts: Sequence[Receipt],
    *,
    where: RowFilter | None = None,
    groups: GroupWeights | None = None,
    with_names: bool = False,
) -> RowIndex:
    """Number the rows of some parts.

    Raises:
        PartCorrupt: a part is missing or unreadable, differs from its receipt in size or number of sequences, or has
            another version or other sketch settings than the first part.
        BalanceImpossible: a row has a group without a weight.
    """
    where = where or RowFilter()
    parts = [_part_index(store, receipt, where, groups, with_names) for receipt in receipts]
    shared = parts[0].metadata
    for receipt, part in zip(receipts, parts, strict=True):
        for name in _SETTINGS:
            if (own := getattr(part.metadata, name)) != (other := getattr(shared, name)):
                problem = f"has {name} {own}, the other parts have {other}"
                raise PartCorrupt(uri=f"{store.uri}/{receipt.path}", problem=problem)
    firsts = np.cumsum([0, *(len(part.lengths) for part in parts)]).tolist()
    names = [part.names for part in parts if part.names is not None]
    factors = [part.factors for part in parts if part.factors is not None]
    return RowIndex(
        lengths=np.concatenate([part.lengths for part in parts]),
        passing=np.concatenate([part.passing for part in parts]),
        groups=[
            [(first + start, first + stop) for start, stop in part.groups[0]]
            for first, part in zip(firsts, parts, strict=False)
        ],
        names=np.concatenate(names) if names else None,
        factors=np.concatenate(factors) if factors else None,
        metadata=shared,
    )


def _part_index(
    store: Store, receipt: Receipt, where: RowFilter, weights: GroupWeights | None, with_names: bool
) -> RowIndex:
    """The index of one part; only the footer and small columns of the file are read."""
    uri = f"{store.uri}/{receipt.path}"
    with open_committed(store, receipt) as (file, metadata):
        index = _indexed(file, metadata, where, weights, with_names, uri=uri)
    if len(index.lengths) != receipt.num_sequences:
        problem = f"has {len(index.lengths)} sequences, its receipt names {receipt.num_sequences}"
        raise PartCorrupt(uri=uri, problem=problem)
    return index


def _indexed(
    file: pq.ParquetFile,
    metadata: PartMetadata,
    where: RowFilter,
    weights: GroupWeights | None,
    with_names: bool,
    *,
    uri: str,
) -> RowIndex:
    footers = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    stops = np.cumsum([0, *(footer.num_rows for footer in footers)]).tolist()
    lengths = np.zeros(stops[-1], dtype=np.int64)
    passing = np.zeros(stops[-1], dtype=np.bool_)
    names = np.zeros(stops[-1], dtype="S32") if with_names else None
    factors = None if weights is None else np.ones(stops[-1], dtype=np.float32)
    extra = [*(["sequence_id"] if with_names else []), *([] if weights is None else [weights.column])]
    columns = list(dict.fromkeys([LABEL_COLUMNS[metadata.schema_version], "entropy", *where.conditions, *extra]))
    groups = [group for group, footer in enumerate(footers) if with_names or where.may_pass(footer)]
    if groups:
        table = file.read_row_groups(groups, columns=columns)
        rows = np.concatenate([np.arange(stops[group], stops[group + 1]) for group in groups])
        lengths[rows] = num_tokens(table)
        passing[rows] = where.passes(table)
        if factors is not None and weights is not None:
            factors[rows[passing[rows]]] = weights.of(table.filter(pa.array(passing[rows])), uri=uri)
        if names is not None:
            names[rows] = np.array(table["sequence_id"].to_pylist(), dtype="S32")
    spans = [(stops[group], stops[group + 1]) for group in range(len(footers))]
    return RowIndex(lengths=lengths, passing=passing, groups=[spans], names=names, factors=factors, metadata=metadata)
