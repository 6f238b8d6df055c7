"""The loss of a batch: a model's hidden states at the batch's positions, compared with the batch's targets.

In: a model as its two halves, and a batch. Out: a mean loss per label, without a tensor of all logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from softshard.config.train import LINEAR_DIVERGENCES, Divergence
from softshard.data.batch import Batch
from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.hidden_states import hidden_states
from softshard.finetune.loss import sparse_divergence
from softshard.models.decoder import Decoder, LowRank
from softshard.sketch.codec import MASS_GRID

__all__ = ["CROSS_ENTROPY", "Objective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How a student is compared with a batch's targets; the default is cross-entropy to them."""

    divergence: Divergence = "forward"
    """`reverse` and `jensen_shannon` are biased for a `threshold` sketch, and wrong for a renormalised head."""
    jsd_beta: float = 0.5
    """Beta of the Jensen-Shannon divergence."""
    temperature: float = 1.0
    """T of the student: its logits are divided by T, and the loss is multiplied by T^2. The batch's targets are used as
    they are, so they should have been captured, or loaded, with that temperature."""

    def loss(
        self,
        decoder: Decoder,
        batch: Batch,
        *,
        num_valid: int,
        chunk_positions: int,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """Mean loss over labels by their weights, in nats; 0 where all weights are 0.

        Weights of groups count in the sum but not in the divisor. The forward loss is the KL to the target plus the
        target's entropy, which is a constant, so its gradient is the KL's; the others are the divergences themselves.

        Args:
            decoder: of the model.
            batch: on the model's device.
            num_valid: vocabulary of the data.
            chunk_positions: positions whose logits exist at one time.
            num_items_in_batch: divides the sum in place of this batch's own weights: the weights of all batches of a
                step, over gradient accumulation and ranks, as transformers counts labels. Sum the gradients over ranks;
                where they are averaged, multiply the loss by the number of ranks.

        Raises:
            ModelInvalid: the batch is packed, and the model mixes the sequences of a row.
        """
        hidden, low_rank = decoder.adapted(hidden_states(decoder, batch))
        return self.loss_from_states(
            hidden,
            decoder,
            batch.targets,
            low_rank=low_rank,
            num_valid=num_valid,
            chunk_positions=chunk_positions,
            num_items_in_batch=num_items_in_batch,
        )

    def loss_from_states(
        self,
        hidden: Tensor,
        decoder: Decoder,
        targets: SparseTargets,
        *,
        num_valid: int,
        chunk_positions: int,
        low_rank: LowRank | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The same loss from hidden states [N, d] and their targets.

        Of the decoder only the output layer is used, to whose product `low_rank` is added.
        """
        if self.divergence not in LINEAR_DIVERGENCES and targets.tail_mass is not None:
            # A stored mass of 0 may be anything up to half a step of the grid, and 0 itself would make the loss
            # infinite: a quarter of a step, the middle of that range, is used.
            targets = replace(targets, tail_mass=targets.tail_mass.clamp(min=MASS_GRID / 4))
        total = sparse_divergence(
            hidden,
            decoder.weight,
            targets,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            num_valid=num_valid,
            chunk_positions=chunk_positions,
            bias=decoder.bias,
            transform=decoder.transform,
            temperature=self.temperature,
            low_rank=low_rank,
        )
        return total / (targets.mean_divisor if num_items_in_batch is None else num_items_in_batch)


CROSS_ENTROPY = Objective()
"""Cross-entropy to the batch's targets."""
