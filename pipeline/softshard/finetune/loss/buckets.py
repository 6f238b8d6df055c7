"""The softmax of a chunk of logits over buckets: some tokens of each position in one bucket each, the others in one.

In: logits [c, V] and the indices of the tokens with a bucket of their own. Out: the log-probability of every bucket.
From the slopes of a loss against the buckets it computes those against the logits, in the logits' own memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenBuckets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBuckets:
    """U tokens with a bucket of their own, and for each of c positions a bucket with the rest of the vocabulary."""

    places: Tensor
    """[U] int64 indices of the tokens in the flattened logits; ascending, without duplicates."""
    rows: Tensor
    """[U] int64 index of each token's position."""
    inverse: Tensor
    """[H] int64 index among the U of each of the places that were given."""
    logprobs: Tensor
    """[U]"""
    rest_logprobs: Tensor
    """[c], -inf where no token is left."""
    lse: Tensor
    """[c] log-sum-exp of all logits."""
    _exponentials: Tensor
    """[c, V] exponentials of the logits of the rest, up to a factor per row; the logits' memory."""
    _rest_sums: Tensor
    """[c] their sums; 1 where no token is left."""

    @classmethod
    def of(cls, logits: Tensor, places: Tensor) -> TokenBuckets:
        """Buckets of `logits`, whose memory is reused. Duplicates in `places` count once.

        The rest has its own largest logit and its own sum, and is never computed as 1 minus the others, so it stays
        exact where the others take all the mass.
        """
        places, inverse = torch.unique(places, return_inverse=True)
        rows = places // logits.shape[1]
        flat = logits.view(-1)
        alone = flat[places]
        alone_lse = _log_sum_exp(alone, rows, len(logits))
        flat[places] = -torch.inf
        top = logits.amax(dim=1)
        top = torch.where(torch.isfinite(top), top, 0.0)
        sums = logits.sub_(top[:, None]).exp_().sum(dim=1)
        rest_lse = top + sums.log()
        lse = torch.logaddexp(alone_lse, rest_lse)
        return cls(
            places=places,
            rows=rows,
            inverse=inverse,
            logprobs=alone - lse[rows],
            rest_logprobs=rest_lse - lse,
            lse=lse,
            _exponentials=logits,
            _rest_sums=torch.where(sums > 0, sums, 1.0),
        )

    def slopes_(self, alone: Tensor, rest: Tensor) -> Tensor:
        """[c, V] slopes against the logits, in the memory of the logits.

        `alone` [U] is dL/dz of each token with its own bucket; `rest` [c] is the sum of dL/dz over the other tokens of
        a position, among which it is distributed by their probabilities.
        """
        slopes = self._exponentials.mul_((rest / self._rest_sums)[:, None])
        slopes.view(-1)[self.places] = alone
        return slopes


def _log_sum_exp(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] log-sum-exp of the values of each row, -inf where it has none."""
    top = values.new_full((num_rows,), -torch.inf).scatter_reduce_(0, rows, values, "amax")
    top = torch.where(torch.isfinite(top), top, 0.0)
    return top + torch.zeros_like(top).index_add_(0, rows, (values - top[rows]).exp()).log()
