"""The rows of a split's parts: how many, how long, in which row group.

In: receipts and the store that their parts lie in. Out: what an order is made of, read from one small column of each
part. The bytes are checked against the receipt when rows are read, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softshard.errors import PartCorrupt
from softshard.shard.encode import open_part
from softshard.shard.manifest import Receipt
from softshard.shard.schema import PartMetadata
from softshard.storage import Store

__all__ = ["RowIndex", "index_rows"]

_SETTINGS = ("kind", "tau", "draws", "k", "nucleus_mass", "step", "temperature", "tokenizer_fingerprint", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowIndex:
    """Rows of several parts, numbered through all of them in their order."""

    lengths: NDArray[np.int64]
    """[R] tokens of each row."""
    groups: list[list[tuple[int, int]]]
    """Numbers of the first row and past the last one, by part and row group."""
    metadata: PartMetadata
    """Of the first part; the others have the same sketch settings."""


def index_rows(store: Store, receipts: Sequence[Receipt]) -> RowIndex:
    """Number the rows of some parts.

    Raises:
        PartCorrupt: a part is missing or unreadable, has not the sequences that its receipt names, or has other sketch
            settings than the first.
    """
    lengths: list[NDArray[np.int64]] = []
    groups: list[list[tuple[int, int]]] = []
    row, shared = 0, None
    for receipt in receipts:
        tokens, sizes, metadata = _lengths_of(store, receipt)
        shared = shared or metadata
        for name in _SETTINGS:
            if getattr(metadata, name) != getattr(shared, name):
                problem = f"has {name} {getattr(metadata, name)}, the other parts have {getattr(shared, name)}"
                raise PartCorrupt(uri=f"{store.uri}/{receipt.path}", problem=problem)
        ends = row + np.cumsum(sizes)
        groups.append([(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)])
        lengths.append(tokens)
        row += len(tokens)
    assert shared is not None
    return RowIndex(lengths=np.concatenate(lengths), groups=groups, metadata=shared)


def _lengths_of(store: Store, receipt: Receipt) -> tuple[NDArray[np.int64], list[int], PartMetadata]:
    """Tokens of each row, rows of each row group, metadata; of the file, only one small column is read."""
    uri = f"{store.uri}/{receipt.path}"
    try:
        with store.open(receipt.path) as stream:
            file, metadata = open_part(stream, uri=uri)
            table = file.read(columns=["first_label", "entropy"])
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="the part is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise PartCorrupt(uri=uri, problem=f"cannot be decompressed: {error}") from error
    if table.num_rows != receipt.num_sequences:
        problem = f"has {table.num_rows} sequences, its receipt names {receipt.num_sequences}"
        raise PartCorrupt(uri=uri, problem=problem)
    labels = table["entropy"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return labels.astype(np.int64) + table["first_label"].to_numpy(), sizes, metadata
