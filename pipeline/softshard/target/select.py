"""Which entries of a distribution are stored: the head of each kind, and the sampled tail.

In: rows of probabilities as a torch tensor on any device. Out: flat entries with their rows. A head is sorted by
falling probability, equal ones by rising id; a tail by rising id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.config import FullSketch, NucleusSketch, SketchSettings, ThresholdSketch, TopkSketch

__all__ = ["BLOCK", "Selection", "block_sums", "sample_tail", "select_head"]

BLOCK = 128
"""Tokens of a block: running sums go block by block, and only blocks that are hit are walked token by token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Entries of some rows, in the order of the rows."""

    rows: Tensor
    """[E] int64"""
    ids: Tensor
    """[E] int64"""
    probabilities: Tensor
    """[E] in the type of the rows."""


def select_head(probabilities: Tensor, settings: SketchSettings, *, vocab_size: int) -> Selection:
    """Head of each row of [rows, vocabulary] probabilities; vocabulary a multiple of BLOCK, padded with zeros."""
    match settings:
        case ThresholdSketch(tau=tau):
            return _sorted(probabilities, *_at_least(probabilities, tau))
        case TopkSketch(k=k):
            _, ids = torch.topk(probabilities[:, :vocab_size], min(k, vocab_size), dim=1)
            return _sorted(probabilities, *_flat(ids, torch.ones_like(ids, dtype=torch.bool)))
        case NucleusSketch(mass=mass, max_entries=most):
            values, ids = torch.topk(probabilities[:, :vocab_size], min(most, vocab_size), dim=1)
            before = values.double().cumsum(1) - values
            return _sorted(probabilities, *_flat(ids, before < mass))
        case FullSketch():
            values, ids = torch.sort(probabilities[:, :vocab_size], dim=1, descending=True, stable=True)
            rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
            return Selection(rows=rows, ids=ids.reshape(-1), probabilities=values.reshape(-1))


def _at_least(probabilities: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Rows and ids of the tokens that are at least tau likely; blocks without one are passed over by their maximum."""
    blocked = probabilities.view(len(probabilities), -1, BLOCK)
    rows, blocks = torch.nonzero(blocked.amax(-1) >= tau, as_tuple=True)
    hits, places = torch.nonzero(blocked[rows, blocks] >= tau, as_tuple=True)
    return rows[hits], blocks[hits] * BLOCK + places


def _flat(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nonzero(wanted, as_tuple=True)[0], ids[wanted]


def _sorted(probabilities: Tensor, rows: Tensor, ids: Tensor) -> Selection:
    by_id = torch.argsort(ids, stable=True)
    rows, ids = rows[by_id], ids[by_id]
    by_probability = torch.argsort(probabilities[rows, ids], descending=True, stable=True)
    rows, ids = rows[by_probability], ids[by_probability]
    by_row = torch.argsort(rows, stable=True)
    rows, ids = rows[by_row], ids[by_row]
    return Selection(rows=rows, ids=ids, probabilities=probabilities[rows, ids])


def block_sums(tail: Tensor) -> Tensor:
    """[rows, vocabulary / BLOCK] running sums, in float64, of the blocks of each row."""
    return tail.view(len(tail), -1, BLOCK).sum(-1, dtype=torch.float64).cumsum(1)


def sample_tail(tail: Tensor, sums: Tensor, uniforms: Tensor, *, tau: float) -> Selection:
    """Systematic sampling of the tail: token i is taken where floor(c_i / tau + u) > floor(c_(i-1) / tau + u).

    c_i is the running sum of the row's tail probabilities in id order, u the row's uniform number. Token i is taken
    with probability p_i / tau and stands for a weight of tau (Duffield, Lund, Thorup: Learn more, sample less, 2005).

    Args:
        tail: [rows, vocabulary] probabilities, all below tau, zero at the head; vocabulary a multiple of BLOCK.
        sums: [rows, vocabulary / BLOCK] of `block_sums`.
        uniforms: [rows] float64 in [0, 1).
        tau: weight of an entry.
    """
    counted = torch.floor(sums / tau + uniforms[:, None])
    before = torch.cat([torch.zeros_like(counted[:, :1]), counted[:, :-1]], dim=1)
    rows, blocks = torch.nonzero(counted > before, as_tuple=True)
    inside = tail.view(len(tail), -1, BLOCK)[rows, blocks]
    base = torch.where(blocks > 0, sums[rows, (blocks - 1).clamp(min=0)], 0.0)
    running = inside.double().cumsum(1) + base[:, None]
    running[:, -1] = sums[rows, blocks]
    walked = torch.floor(running / tau + uniforms[rows, None])
    previous = torch.cat([before[rows, blocks][:, None], walked[:, :-1]], dim=1)
    hits, places = torch.nonzero((walked > previous) & (inside > 0), as_tuple=True)
    return Selection(rows=rows[hits], ids=blocks[hits] * BLOCK + places, probabilities=inside[hits, places])
