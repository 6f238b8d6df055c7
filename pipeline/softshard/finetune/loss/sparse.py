"""Losses between sparse targets and a model's distributions, from hidden states and the output matrix.

In: hidden states, an output layer, sparse targets. Out: a divergence summed over positions, with its gradients.
"""

from __future__ import annotations

from torch import Tensor

from softshard.config.train import Divergence
from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss.divergences import DIVERGENCES
from softshard.finetune.loss.entries import ChunkedTargets
from softshard.finetune.loss.projection import OutputLayer, chunked_loss
from softshard.models.decoder import PLAIN_LOGITS, LogitTransform, LowRank

__all__ = ["sparse_divergence", "sparse_kl"]


def sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    temperature: float = 1.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """KL(target || model), up to the target's own entropy, summed over positions.

    With z the logits, a position adds w * (m * lse(z) - sum_i P_i z_i): the cross-entropy to its entries, whose mass
    m = sum_i P_i need not be 1. Divide the result by the sum of the weights, over all ranks where there are several.

    With `targets.tail_mass`, a ghost token represents all tokens outside the head and adds
    -w * tail * ln(1 - sum_head softmax(z)). It is computed from the tokens outside, so that it stays finite when the
    head takes all the mass. If the head is the whole vocabulary, there is no ghost token.

    With a temperature T the loss is T^2 * KL(p_T || softmax(z / T)), whose gradients keep their size as T grows
    (Hinton, Vinyals, Dean, 2015, section 2). The targets are used as given: they should be p_T, proportional to
    p^(1/T).

    Args:
        hidden: [N, d] hidden states, one for each label of `targets`.
        weight: [V, d] output matrix.
        targets: of the N labels, with ids below `num_valid`.
        num_valid: vocabulary of the data; further logits are padding and are left out.
        chunk_positions: positions whose logits exist at one time.
        bias: [V] bias of the output layer.
        transform: from the output layer's product to the logits.
        temperature: T.
        low_rank: what an adapter of the output layer adds to the product: [N, r] features and a [V, r] factor.

    Raises:
        ValueError: sizes do not fit together, or an id is not below `num_valid`.
    """
    return sparse_divergence(
        hidden,
        weight,
        targets,
        divergence="forward",
        num_valid=num_valid,
        chunk_positions=chunk_positions,
        bias=bias,
        transform=transform,
        temperature=temperature,
        low_rank=low_rank,
    )


def sparse_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    divergence: Divergence,
    jsd_beta: float = 0.5,
    num_valid: int,
    chunk_positions: int,
    bias: Tensor | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    temperature: float = 1.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """A divergence between target and model, summed over positions.

    `forward` is `sparse_kl`. The other two are taken over buckets: each token of a position's head, and all other
    tokens together. With P the target's mass in a bucket, Q the model's, and M = beta * P + (1 - beta) * Q:

        reverse         KL(Q || P) = sum Q ln(Q / P)
        jensen_shannon  beta * KL(P || M) + (1 - beta) * KL(Q || M)      (generalised: Agarwal et al., 2306.13649)

    An entry outside the head (`targets.entry_in_head`), such as the label's own share, is added to the bucket of its
    token: that of the head if the token is in it, else the last. Weights need not sum to 1. The reverse KL is infinite
    where the target has no mass in a bucket and the model has some, and so where a ghost's mass was rounded to 0; a
    head token's mass is raised to at least float32's smallest normal number. With a temperature T, Q comes from
    softmax(z / T) and the result is multiplied by T^2.

    Args:
        divergence: a key of `DIVERGENCES`.
        jsd_beta: beta, above 0 and below 1; only `jensen_shannon` uses it.
        hidden, weight, targets, num_valid, chunk_positions, bias, transform, temperature, low_rank: as in `sparse_kl`.

    Raises:
        ValueError: as in `sparse_kl`, or beta is out of its range.
    """
    output_layer = OutputLayer(weight, bias, transform, temperature, num_valid, chunk_positions, low_rank)
    chunked = ChunkedTargets.of(targets, hidden=hidden, output_layer=output_layer)
    return chunked_loss(hidden, output_layer, DIVERGENCES[divergence](chunked, jsd_beta), kept=chunked.kept)
