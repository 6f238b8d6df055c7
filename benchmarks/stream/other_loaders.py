"""Loaders of other projects for the rows that `measure.py` streams.

In: the parts of a target set. Out: batches of the same tensors, in the order in which the rows were written. A loader
gets either the arrays of a part's columns, which softshard's functions then decode batch by batch, or entries with the
label mixed in, which need no decoding. A loader whose package is not installed raises ImportError.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from softshard.data.batch import Batch, collate_mixed
from softshard.data.mixing import MixedRow, Mixing, mixed_rows
from softshard.shard.decode import Block, Decoder, open_part
from softshard.shard.read import PartReader
from softshard.shard.schema import PartMetadata
from softshard.sketch.codec import counts_to_offsets, decode_head, decode_tail, ids_by_rank
from softshard.sketch.entries import ranges_from
from softshard.sketch.types import SequenceTargets

__all__ = ["Form", "Loader", "Stored", "make_datasets", "make_litdata", "make_mosaic"]

Arrays = dict[str, NDArray[Any]]
Form = Literal["columns", "entries"]


class Loader(Protocol):
    title: str
    num_bytes: int
    """On disk."""

    def batches(self) -> Iterator[Batch]:
        """One epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    metadata: PartMetadata
    by_rank: NDArray[np.int32]


class Stored:
    """The rows of some parts as other loaders are given them, and back to batches."""

    def __init__(self, files: Sequence[Path], *, mixing: Mixing, batch_tokens: int) -> None:
        self.files = tuple(files)
        self._mixing, self._batch_tokens = mixing, batch_tokens
        self._parts = []
        for file in files:
            metadata = open_part(file.read_bytes(), uri=str(file))[1]
            frequent = np.array(metadata.frequent_ids, dtype=np.int32)
            self._parts.append(_Part(metadata=metadata, by_rank=ids_by_rank(frequent, vocab_size=metadata.vocab_size)))

    def rows(self, form: Form) -> Iterator[Arrays]:
        for number, file in enumerate(self.files):
            yield from self._columns(number, file) if form == "columns" else self._entries(file)

    def _columns(self, number: int, file: Path) -> Iterator[Arrays]:
        names = Decoder.columns(with_scores=False)
        table = open_part(file.read_bytes(), uri=str(file))[0].read(columns=names)
        for row in range(table.num_rows):
            values = {name: table[name][row] for name in names if name != "first_label"}
            lists = {name: value.values.to_numpy(zero_copy_only=False) for name, value in values.items()}
            yield {"place": np.array([number, table["first_label"][row].as_py()], dtype=np.int32), **lists}

    def _entries(self, file: Path) -> Iterator[Arrays]:
        reader = PartReader(file.read_bytes(), uri=str(file))
        for block in itertools.chain.from_iterable(map(reader.blocks, range(reader.num_groups))):
            for _, row in mixed_rows(block, range(len(block.lengths)), metadata=reader.metadata, mixing=self._mixing):
                yield {
                    "place": np.array([0, row.positions[0] + 1], dtype=np.int32),
                    "token_ids": row.token_ids,
                    "counts": row.counts.astype(np.int32),
                    "entry_ids": row.entry_ids,
                    "entry_weights": row.entry_weights,
                }

    def batches(self, rows: Iterator[Arrays], form: Form) -> Iterator[Batch]:
        """Batches of consecutive rows, of a padded size within the budget."""
        batch: list[Arrays] = []
        longest = 0
        for row in rows:
            longest = max(longest, len(row["token_ids"]))
            if batch and (len(batch) + 1) * longest > self._batch_tokens:
                yield self._collate(batch, form)
                batch, longest = [], len(row["token_ids"])
            batch.append(row)
        if batch:
            yield self._collate(batch, form)

    def _collate(self, rows: Sequence[Arrays], form: Form) -> Batch:
        if form == "columns":
            by_part = itertools.groupby(rows, key=lambda row: int(row["place"][0]))
            return collate_mixed([row for part, own in by_part for row in self._decoded(self._parts[part], list(own))])
        names = ("token_ids", "counts", "entry_ids", "entry_weights")
        return collate_mixed(
            [
                MixedRow(
                    np.arange(row["place"][1] - 1, len(row["token_ids"]) - 1),
                    *(row[name] for name in names),
                    None,
                    None,
                )
                for row in rows
            ]
        )

    def _decoded(self, part: _Part, rows: Sequence[Arrays]) -> Iterator[MixedRow]:
        flat = {name: np.concatenate([row[name] for row in rows]) for name in rows[0] if name != "place"}
        heads, tails = flat["head_count"], flat["tail_count"]
        unknown = np.full(len(heads), np.nan, dtype=np.float32)
        lengths = np.array([len(row["token_ids"]) for row in rows])
        firsts = np.array([int(row["place"][1]) for row in rows])
        block = Block(
            token_ids=flat["token_ids"],
            lengths=lengths,
            label_indices=ranges_from(counts_to_offsets(lengths)[:-1] + firsts, lengths - firsts),
            label_counts=lengths - firsts,
            targets=SequenceTargets(
                label_logprob=unknown,
                entropy=unknown,
                tail_mass=flat["tail_mass"],
                head_count=heads,
                tail_count=tails,
                head_ids=part.by_rank[flat["head_ranks"]],
                head_logprobs=(decode_head(flat["head_steps"], heads) * -part.metadata.step).astype(np.float32),
                tail_ids=part.by_rank[decode_tail(flat["tail_gaps"], tails)],
            ),
        )
        return (row for _, row in mixed_rows(block, range(len(rows)), metadata=part.metadata, mixing=self._mixing))


class _Loaded:
    def __init__(
        self, title: str, stored: Stored, rows: Callable[[], Iterator[Arrays]], *, form: Form, num_bytes: int
    ) -> None:
        self.title, self.num_bytes = f"{title}, {form}", num_bytes
        self._stored, self._rows, self._form = stored, rows, form

    def batches(self) -> Iterator[Batch]:
        return self._stored.batches(self._rows(), self._form)


def make_datasets(stored: Stored) -> Loader:
    """datasets, streaming the very parts as numpy arrays."""
    from datasets import load_dataset

    streams = [
        load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        .select_columns(Decoder.columns(with_scores=False))
        .with_format("numpy")
        for file in stored.files
    ]

    def rows() -> Iterator[Arrays]:
        for number, stream in enumerate(streams):
            for row in stream:
                yield {**row, "place": np.array([number, row["first_label"]])}

    def without_first_label() -> Iterator[Arrays]:
        return ({name: values for name, values in row.items() if name != "first_label"} for row in rows())

    num_bytes = sum(file.stat().st_size for file in stored.files)
    return _Loaded("datasets", stored, without_first_label, form="columns", num_bytes=num_bytes)


def make_mosaic(stored: Stored, folder: Path, *, form: Form) -> Loader:
    """mosaicml-streaming: the speed is that of uncompressed shards, the bytes are those of compressed ones.

    It unpacks compressed shards beside them once, and reads the copies from then on.
    """
    _find_mosaic()
    from streaming.base import MDSWriter, StreamingDataset

    arrays = list(stored.rows(form))
    columns = {name: f"ndarray:{values.dtype}" for name, values in arrays[0].items()}
    for name, compression in (("plain", None), ("zstd", "zstd:9")):
        with MDSWriter(out=str(folder / name), columns=columns, compression=compression, size_limit=2**22) as writer:
            for one in arrays:
                writer.write(one)
    data = StreamingDataset(local=str(folder / "plain"), shuffle=False, batch_size=1)
    return _Loaded("mosaicml-streaming", stored, lambda: iter(data), form=form, num_bytes=_bytes_below(folder / "zstd"))


def _find_mosaic() -> None:
    """Make its submodules importable: its __init__ imports torchvision, whose usual build wants CUDA's libraries."""
    if "streaming" in sys.modules:
        return
    found = importlib.util.find_spec("streaming")
    if found is None or found.origin is None:
        raise ImportError("mosaicml-streaming is not installed")
    package = types.ModuleType("streaming")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["streaming"] = package


def make_litdata(stored: Stored, folder: Path, *, form: Form, compressed: bool) -> Loader:
    """litdata, with chunks as they are in memory or compressed by zstd, which it unpacks in every epoch."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=2**22, compression="zstd" if compressed else None)
    for index, row in enumerate(stored.rows(form)):
        writer[index] = row
    writer.done()
    writer.merge()
    data = StreamingDataset(str(folder), shuffle=False)
    title = "litdata zstd" if compressed else "litdata raw"
    return _Loaded(title, stored, lambda: iter(data), form=form, num_bytes=_bytes_below(folder))


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
