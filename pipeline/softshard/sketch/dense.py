"""One pass over the dense distributions, a few rows at a time, which keeps a few sums of each row.

Everything after it is computed from these sums. Softmax, block sums, squares and the product with the logits are the
only operations on whole distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.config import SketchSettings
from softshard.sketch.blocks import BlockedRows, block_sums
from softshard.sketch.fidelity import RANKS
from softshard.sketch.selection import Selection, ranked_head

__all__ = ["DenseSums", "sum_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSums:
    """Sums of each row's distribution, and the head where it has to be selected during the pass."""

    log_sums: Tensor
    """[rows] float64 log-sum-exp of the logits; not finite where they are invalid."""
    block_sums: Tensor
    """[rows, blocks] float64 probabilities of each block, without those of `head`."""
    square_sums: Tensor
    """[rows] float64 sums of squared probabilities."""
    entropy: Tensor
    """[rows] float64, in nats"""
    label_logprob: Tensor
    """[rows] float64, in nats"""
    head: Selection | None
    """None for a kind with a sampled tail, whose head is found by `threshold_head` from the sums."""
    most_likely: NDArray[np.float32]
    """[ranked rows, at most 512] probabilities in descending order."""


def sum_rows(rows: BlockedRows, labels: Tensor, settings: SketchSettings, *, ranked: NDArray[np.intp]) -> DenseSums:
    """Pass over all rows once.

    Args:
        rows: logits.
        labels: [rows] int64 ids of the labels.
        settings: kind of sketch; without a sampled tail, the head is selected here.
        ranked: rows of which the largest probabilities are returned too.
    """
    sums = torch.empty((rows.num_rows, rows.num_blocks), device=rows.device)
    norms, products, chosen = (torch.empty(rows.num_rows, device=rows.device) for _ in range(3))
    heads: list[Selection] = []
    head_masses: list[Tensor] = []
    most_likely: list[Tensor] = []
    size, most = rows.chunk_rows, min(RANKS[-1], rows.vocab_size)
    by_chunk = [torch.split(part, size) for part in (sums, norms, products, chosen[:, None], labels[:, None])]
    for number, (scores, probabilities, scratch) in enumerate(rows.chunks()):
        chunk_sums, chunk_norms, chunk_products, chunk_chosen, chunk_labels = (part[number] for part in by_chunk)
        torch.linalg.vector_norm(probabilities, dim=1, out=chunk_norms)
        torch.sum(torch.mul(probabilities, scores, out=scratch), 1, out=chunk_products)
        torch.gather(probabilities, 1, chunk_labels, out=chunk_chosen)
        for row in ranked[ranked // size == number].tolist():
            most_likely.append(torch.topk(probabilities[row % size], most).values)
        if not settings.samples_tail:
            found, mass = ranked_head(probabilities, settings)
            heads.append(replace(found, rows=found.rows + number * size))
            head_masses.append(mass)
        block_sums(probabilities, out=chunk_sums)
    head = _joined(heads) if heads else None
    sums = sums.double()
    total = sums.sum(1)
    if head is not None:
        total += torch.cat(head_masses)
        head = replace(head, probabilities=head.probabilities / total[head.rows])
    label_scores = rows.token_scores(labels).double()
    # The softmax sums in float32, with an error of 1e-5 over a large vocabulary; the sums of blocks have none of it.
    log_sums = _log_sums(rows, label_scores, chosen.double()) + total.log()
    products = _without_zero_times_infinity(rows, products).double() / total
    return DenseSums(
        log_sums=log_sums,
        block_sums=sums / total[:, None],
        square_sums=(norms.double() / total) ** 2,
        entropy=(log_sums - products).clamp(min=0),
        label_logprob=label_scores - log_sums,
        head=head,
        most_likely=torch.stack(most_likely).cpu().numpy() if most_likely else np.zeros((0, most), np.float32),
    )


def _log_sums(rows: BlockedRows, label_scores: Tensor, chosen: Tensor) -> Tensor:
    """[rows] from the label's logit and probability, which saves a pass; from all logits where that is below 1e-30."""
    log_sums = label_scores - chosen.log()
    lost = torch.nonzero(~(chosen > 1e-30))[:, 0]
    for row in lost.tolist():
        log_sums[row] = torch.logsumexp(rows.scores(slice(row, row + 1)), 1).double()[0]
    return log_sums


def _without_zero_times_infinity(rows: BlockedRows, products: Tensor) -> Tensor:
    """Sums of probability times logit, computed again where a logit of -inf made them NaN."""
    for found in torch.split(torch.nonzero(torch.isnan(products))[:, 0], rows.chunk_rows):
        scores = rows.scores(found)
        probabilities = torch.softmax(scores, 1)
        products[found] = (probabilities * scores.masked_fill(probabilities == 0, 0)).sum(1)
    return products


def _joined(parts: Sequence[Selection]) -> Selection:
    return Selection(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Selection)}
    )
