"""Stored targets as a data set for torch: `SoftLabelDataset`.

In: the targets of a run, or a blend of several runs, on a disk or in a bucket. Out: this rank's batches. Their order is
a function of (manifest, seed, epoch, filter) and of the sizes of batch and buffer; the buffer bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from softshard.data.batch import Batch, collate_mixed
from softshard.data.blend import Blend, BlendReader
from softshard.data.mixing import LabelWeights, Mixing
from softshard.data.sharding import ShardedBatches
from softshard.data.target_set import EpochOrder, SetReader, TargetSet, order_epoch
from softshard.errors import TargetsUnsuitable
from softshard.records.digest import canonical_digest
from softshard.shard.schema import PartMetadata

__all__ = ["SoftLabelDataset"]


class SoftLabelDataset(ShardedBatches):
    """Batches of sequences with their stored targets; each epoch takes the next draw of the tails.

    Args:
        targets: one split of a run's targets, or several runs' targets of the same sequences.
        seed: of the order.
        batch_tokens: tokens of a batch, including padding; a longer sequence is a batch of its own.
        shuffle_buffer: sequences in the shuffle buffer, which mixes rows across row groups.
        alpha, truncated, temperature: as in `Mixing`.
        weights: of labels in the loss; None: all are 1.
        packing: one row of tokens per batch, without padding.
        rank, world_size, prefetch: as in `ShardedBatches`.

    Raises:
        ValueError: alpha, temperature or `truncated` is out of its range.
        TargetsUnsuitable: the temperature cannot be applied to targets of this kind.
        CorpusEmpty: the split has no sequence.
        FilterMatchesNothing, BlendIncomplete, BlendInvalid, PartCorrupt: when the data is first needed.
    """

    def __init__(
        self,
        targets: TargetSet | Blend,
        *,
        seed: int,
        batch_tokens: int,
        shuffle_buffer: int,
        alpha: float,
        truncated: Literal["ghost", "renormalise"] = "ghost",
        temperature: float = 1.0,
        weights: LabelWeights | None = None,
        packing: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int = 2,
    ) -> None:
        mixing = Mixing(alpha=alpha, truncated=truncated, temperature=temperature, weights=weights or LabelWeights())
        first = targets.sets[0] if isinstance(targets, Blend) else targets
        for target_set in targets.sets if isinstance(targets, Blend) else (targets,):
            if (problem := mixing.problem_with(target_set.manifest.sketch)) is not None:
                raise TargetsUnsuitable(uri=target_set.store.uri, problem=problem)
        self._reader = BlendReader(targets, mixing) if isinstance(targets, Blend) else SetReader(targets, mixing)
        self.uri = first.store.uri
        """Of the targets, for messages; of a blend, of its first set."""
        self._seed, self._batch_tokens, self._shuffle_buffer = seed, batch_tokens, shuffle_buffer
        self._packing, self.alpha = packing, alpha
        """Weight of the label's own token."""
        self.temperature = None if alpha == 1 else temperature * first.manifest.sketch.temperature
        """Temperature of the targets as loaded; None with alpha 1, which uses nothing of them."""
        where = {name: list(value) for name, value in first.where.conditions.items()}
        order = {
            "manifest": self._reader.digest,
            "split": first.split,
            "where": where,
            "seed": seed,
            "batch_tokens": batch_tokens,
            "shuffle_buffer": shuffle_buffer,
            "packing": packing,
        }
        groups = None if first.groups is None else first.groups.digest_parts()
        content = canonical_digest([self._reader.digest, first.split, where, groups, packing, mixing.digest_parts()])
        super().__init__(order=order, content=content, rank=rank, world_size=world_size, prefetch=prefetch)
        self._epoch_orders: dict[int, EpochOrder] = {}

    @property
    def metadata(self) -> PartMetadata:
        """Of the first part: vocabulary, tokenizer and sketch settings."""
        return self._reader.metadata

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch, of all ranks together."""
        return self.epoch_order(epoch).num_batches

    def read(self, epoch: int, numbers: Sequence[int]) -> Iterator[Batch]:
        """Some batches of an epoch, by ascending number."""
        order = self.epoch_order(epoch)
        rows = self._reader.rows(order, numbers, draw=epoch)
        for number in numbers:
            taken = [next(rows) for _ in range(order.bounds[number], order.bounds[number + 1])]
            yield collate_mixed(taken, packing=self._packing, own_token=self.alpha > 0)

    def epoch_order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; that of the last epoch asked for is kept."""
        if epoch not in self._epoch_orders:
            order = order_epoch(
                self._reader.index,
                key=(self._reader.digest, self._seed, epoch),
                batch_tokens=self._batch_tokens,
                shuffle_buffer=self._shuffle_buffer,
                packing=self._packing,
            )
            self._epoch_orders = {epoch: order}
        return self._epoch_orders[epoch]
