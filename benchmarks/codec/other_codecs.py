"""The same distributions in other formats: DistillKit's compressor, Megatron-LM's offline logits, plain Parquet lists.

In: the most likely tokens of each label, chosen beforehand, so that the choice is not timed. Out: codecs that encode
and decode them and check the result. DistillKit and Megatron-LM are imported from a checkout, so that their own code
packs and unpacks; of Megatron-LM only two modules, with stand-ins for the GPU libraries that they import.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import require

__all__ = ["Codec", "DistillKit", "DistillKitFile", "Megatron", "ParquetLists", "TopEntries", "megatron_modules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopEntries:
    """The k most likely tokens of N labels, the most likely first."""

    ids: Tensor
    """[N, k] int64"""
    logprobs: Tensor
    """[N, k] float32"""

    def blocks(self, num_labels: int, *, k: int) -> list[TopEntries]:
        """The k most likely of them, so many labels at a time."""
        ids, logprobs = (torch.split(values[:, :k].contiguous(), num_labels) for values in (self.ids, self.logprobs))
        return [TopEntries(ids=i, logprobs=p) for i, p in zip(ids, logprobs, strict=True)]


class Codec(Protocol):
    """`encode` and `decode` are what is timed."""

    title: str
    num_entries: int
    """Of all labels together."""

    def encode(self) -> Any: ...

    def decode(self, stored: Any) -> Any: ...

    def num_bytes(self, stored: Any) -> int: ...

    def check(self, decoded: Any) -> None:
        """Raises harness.WrongAnswer."""


class ParquetLists:
    """What one writes first: a row a label, a list of int32 ids and one of float32 probabilities, zstd."""

    def __init__(
        self, title: str, *, ids: NDArray[np.int32], probabilities: NDArray[np.float32], offsets: NDArray[np.int32]
    ) -> None:
        self.title, self.num_entries = f"Parquet lists, {title}", len(ids)
        self._given = (ids, probabilities, offsets)

    def encode(self) -> bytes:
        ids, probabilities, offsets = map(pa.array, self._given)
        lists = {"ids": ids, "probabilities": probabilities}
        table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in lists.items()})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    def decode(self, stored: bytes) -> tuple[NDArray[Any], ...]:
        table = pq.read_table(pa.BufferReader(stored), use_threads=False).combine_chunks()
        ids, probabilities = (table[name].chunk(0) for name in ("ids", "probabilities"))
        return ids.values.to_numpy(), probabilities.values.to_numpy(), ids.offsets.to_numpy()

    def num_bytes(self, stored: bytes) -> int:
        return len(stored)

    def check(self, decoded: tuple[NDArray[Any], ...]) -> None:
        same = all(np.array_equal(given, back) for given, back in zip(self._given, decoded, strict=True))
        require(same, f"{self.title}: ids and probabilities come back")


_DISTILLKIT = {
    128: {"exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    50: {"exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
"""The settings that its README recommends, and its "budget pick", by k."""
_DISTILLKIT_BOTH = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}


class DistillKit:
    """Its `LogprobCompressor` alone: encoding ends with its byte tensors in memory, and decoding starts there.

    Args:
        k: 128 or 50.
        top: at least k tokens of each label.
        vocab_size: V.
        block: labels of a sequence. Its compressor takes one sequence a call, and is fastest where what it unfolds to
            bits stays in the cache.
    """

    def __init__(self, k: int, top: TopEntries, *, vocab_size: int, block: int) -> None:
        compression = importlib.import_module("distillkit.compression")
        settings = {"k": k, "d": vocab_size, **_DISTILLKIT[k], **_DISTILLKIT_BOTH}
        config = compression.DistributionQuantizationConfig.model_validate(settings)
        self._compressor = compression.LogprobCompressor(config=config)
        self._given = top.blocks(block, k=k)
        self.title = f"DistillKit k={k}, {block:,} a call"
        self.num_entries = sum(entries.ids.numel() for entries in self._given)

    def encode(self) -> Any:
        return [self._compressor.compress_from_sparse(one.ids[None], one.logprobs[None]) for one in self._given]

    @torch.no_grad()
    def decode(self, stored: Any) -> list[tuple[Tensor, Tensor]]:
        return [self._compressor.decompress_to_sparse(row) for row in stored]

    def num_bytes(self, stored: Any) -> int:
        return sum(values.numel() for row in stored for values in row.values())

    def check(self, decoded: list[tuple[Tensor, Tensor]]) -> None:
        ids = torch.cat([ids[0] for ids, _ in decoded]).sort(1).values
        same = torch.equal(ids, torch.cat([one.ids for one in self._given]).sort(1).values)
        require(same, f"{self.title}: ids come back, label by label")


class DistillKitFile(DistillKit):
    """The same with the Parquet files that its capture writes, and with reading them as its trainer does.

    The trainer takes a row of a `datasets.Dataset` as Python lists and makes tensors of them. Token ids are left out.
    """

    def __init__(self, top: TopEntries, *, vocab_size: int, block: int, folder: Path) -> None:
        super().__init__(128, top, vocab_size=vocab_size, block=block)
        self._files = importlib.import_module("distillkit.sample_common")
        self._datasets = importlib.import_module("datasets")
        self._folder = folder
        self.title = "DistillKit k=128, files"

    def encode(self) -> Path:
        schema = self._files.compressed_logit_schema()
        with self._files.StreamingParquetWriter(
            str(self._folder), schema=schema, file_max_rows=256, queue_maxsize=512
        ) as writer:
            for row in super().encode():
                writer.write({"input_ids": [], **{name: values[0].tolist() for name, values in row.items()}})
        return self._folder

    def decode(self, stored: Path) -> list[tuple[Tensor, Tensor]]:
        rows = self._datasets.Dataset(self._datasets.table.InMemoryTable(pq.read_table(stored, use_threads=False)))
        return super().decode({name: torch.tensor([values]) for name, values in row.items()} for row in rows)

    def num_bytes(self, stored: Path) -> int:
        return sum(file.stat().st_size for file in stored.iterdir())


_MICROBATCHES = 64
"""Sequences that Megatron-LM packs into one member of its tar."""


class Megatron:
    """Its `LogitsSaverHooks` from the chosen tokens on, into its tar of zstd, and its reader.

    Args:
        modules: of `megatron_modules`.
        top: k tokens of each label.
        top_p: mass after which a label's other tokens are masked, None for all k.
        block: labels of a sequence, which is a microbatch.
        folder: where the tar is written.
    """

    def __init__(
        self, modules: SimpleNamespace, top: TopEntries, *, top_p: float | None, block: int, folder: Path
    ) -> None:
        k = top.ids.shape[1]
        self._modules, self._given, self._top_p = modules, top.blocks(block, k=k), top_p
        self._saver = modules.saver.LogitsSaverHooks(str(folder), k, p=top_p)
        self.title = f"Megatron-LM k={k}" + ("" if top_p is None else f" p={top_p}")
        self.num_entries = sum(int(self._kept(one).sum()) for one in self._given)

    def _kept(self, entries: TopEntries) -> Tensor:
        probabilities = entries.logprobs.exp()
        return probabilities.cumsum(1) - probabilities < (torch.inf if self._top_p is None else self._top_p)

    def encode(self) -> Path:
        saver, packed = self._saver, []
        for one in self._given:
            values, ids = one.logprobs[:, None], one.ids[:, None]
            if self._top_p is not None:
                values, ids = saver._apply_topp_truncation(values, ids)
            packed.append((values.to(saver._save_dtype), *self._modules.format.pack_indices(ids)))
        for start in range(0, len(packed), _MICROBATCHES):
            self._modules.arguments.curr_iteration = start
            saver._buffer_iteration(*map(list, zip(*packed[start : start + _MICROBATCHES], strict=True)))
        file, *rest = saver.take_pending_data()
        saver._write_batched_tar(file, *rest)
        return Path(file)

    def decode(self, stored: Path) -> list[tuple[Tensor, Tensor]]:
        reader = self._modules.format
        entries = reader.iter_logprobs_tar_entries(str(stored))
        members = [reader.decode_logprobs_payload(entry.data) for entry in entries]
        return [(ids[:, 0], values[:, 0]) for member in members for values, ids in zip(*member, strict=True)]

    def num_bytes(self, stored: Path) -> int:
        return stored.stat().st_size

    def check(self, decoded: list[tuple[Tensor, Tensor]]) -> None:
        same = all(self._same(*pair) for pair in zip(self._given, decoded, strict=True))
        require(same, f"{self.title}: ids come back, and values as float16")

    def _same(self, given: TopEntries, back: tuple[Tensor, Tensor]) -> bool:
        ids, values = back
        kept, width = self._kept(given), ids.shape[1]
        inside = kept[:, :width]
        return (
            int(kept.sum()) == int(inside.sum())
            and torch.equal(ids[inside], given.ids[:, :width][inside])
            and torch.equal(values[inside], given.logprobs[:, :width].half()[inside])
        )


def megatron_modules(checkout: Path) -> SimpleNamespace:
    """Megatron-LM's `saver` and `format`, and the `arguments` that they take for its command line.

    What only stands in is what a single process without a GPU has no use for. Raises ImportError.
    """
    importlib.import_module("zstandard")  # they would notice its absence in the middle of writing
    arguments = SimpleNamespace(mtp_num_layers=None, curr_iteration=0)
    values: dict[str, dict[str, Any]] = {
        "megatron": {},
        "megatron.core": {"parallel_state": SimpleNamespace(**_ONE_RANK)},
        "megatron.core.models.common.language_module.language_module": {"LanguageModule": torch.nn.Module},
        "megatron.core.num_microbatches_calculator": {"get_num_microbatches": lambda: 1},
        "megatron.training": {"get_args": lambda: arguments, "get_tensorboard_writer": lambda: None},
        "megatron.training.utils": {
            "get_blend_and_blend_per_split": lambda _: (None, None),
            "print_rank_0": lambda _: None,
        },
    }
    with mock.patch.dict(sys.modules, {name: _stand_in(name, contents) for name, contents in values.items()}):
        _load("megatron.core.msc_utils", checkout)
        format_ = _load("megatron.training.distillation.utils_logits", checkout)
        saver = _load("megatron.training.distillation.logits_saver", checkout)
    return SimpleNamespace(saver=saver, format=format_, arguments=arguments)


_ONE_RANK = {
    "get_tensor_model_parallel_rank": lambda: 0,
    "get_tensor_model_parallel_world_size": lambda: 1,
    "get_tensor_model_parallel_group": lambda: None,
    "get_tensor_model_parallel_src_rank": lambda: 0,
    "get_context_parallel_rank": lambda: 0,
    "get_data_parallel_rank": lambda: 0,
}


def _stand_in(name: str, contents: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _load(name: str, checkout: Path) -> ModuleType:
    """A module by its file, without the packages above it."""
    file = checkout.joinpath(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"{file} is not there", name=name)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
