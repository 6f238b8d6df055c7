"""The softmax of a chunk of logits over cells: some tokens of each position alone, all its others together.

In: logits [c, V] and the places of the tokens that stand alone. Out: the log-probability of every cell. From the slopes
of a loss against the cells it makes those against the logits, in the logits' own memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenBuckets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBuckets:
    """U tokens that stand alone, and c cells of what is left, one a position."""

    places: Tensor
    """[U] int64, of the tokens in the flattened logits; ascending, none twice."""
    rows: Tensor
    """[U] int64, their positions."""
    inverse: Tensor
    """[H] int64, which of the U each of the places that were given is."""
    logprobs: Tensor
    """[U]"""
    rest_logprobs: Tensor
    """[c], -inf where no token is left."""
    lse: Tensor
    """[c] log-sum-exp of all logits."""
    _exponentials: Tensor
    """[c, V] those of the tokens left, up to a factor of each row; the logits' memory."""
    _rest_sums: Tensor
    """[c] their sums; 1 where no token is left."""

    @classmethod
    def of(cls, logits: Tensor, places: Tensor) -> TokenBuckets:
        """TokenBuckets of `logits`, which are used up; a place that is named twice is the same as once.

        The rest has a largest logit and a sum of its own, and is never 1 minus the others, so that it stays exact where
        they take all the mass.
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
        """[c, V] slopes against the logits, from those against the cells' log-odds, in the memory of the logits.

        `alone` [U] and `rest` [c] are dL/dz of a token that stands alone, and the sum of dL/dz over the tokens left,
        among which it is shared by their probabilities.
        """
        slopes = self._exponentials.mul_((rest / self._rest_sums)[:, None])
        slopes.view(-1)[self.places] = alone
        return slopes


def _log_sum_exp(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] log-sum-exp of the values of each row, -inf where it has none."""
    top = values.new_full((num_rows,), -torch.inf).scatter_reduce_(0, rows, values, "amax")
    top = torch.where(torch.isfinite(top), top, 0.0)
    return top + torch.zeros_like(top).index_add_(0, rows, (values - top[rows]).exp()).log()
