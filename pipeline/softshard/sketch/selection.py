"""Selection of the entries that are stored: the head of each kind, and the sampled tail.

The entries of all rows are in flat arrays, with the row of each. Heads are sorted by descending probability, then by
ascending id; tails by ascending id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softshard.config import SketchSettings
from softshard.sketch.blocks import BLOCK, BlockedRows

__all__ = ["Selection", "ranked_head", "sample_tail", "threshold_head"]

_JUST_BELOW = 1 - 1e-5
"""Factor on tau for float32 rounding: a block whose sum is this close below tau is read too, which only costs time."""

_ENTRIES_AT_ONCE = 2**16
"""Tail entries whose blocks are read at a time: some 50 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Entries, in the order of their rows."""

    rows: Tensor
    """[E] int64"""
    ids: Tensor
    """[E] int64"""
    probabilities: Tensor
    """[E] float64"""


def ranked_head(probabilities: Tensor, settings: SketchSettings) -> tuple[Selection, Tensor]:
    """The most likely tokens of each row, as far as `max_head_entries` and `head_mass` of the settings allow.

    `probabilities`, [rows, V] float32, become zero where a token is selected. Also returns the mass of each row's
    head, [rows] float64.
    """
    vocab_size, mass = probabilities.shape[1], settings.head_mass
    most = vocab_size if settings.max_head_entries is None else settings.max_head_entries
    if most < vocab_size:
        values, ids = torch.topk(probabilities, most, dim=1)
    else:
        values, ids = torch.sort(probabilities, dim=1, descending=True, stable=True)
    exact = values.double()
    wanted = torch.ones_like(ids, dtype=torch.bool) if mass is None else exact.cumsum(1) - exact < mass
    rows = torch.nonzero(wanted, as_tuple=True)[0]
    head = _sorted(rows, ids[wanted], values[wanted])
    probabilities[head.rows, head.ids] = 0
    return head, (exact * wanted).sum(1)


def threshold_head(rows: BlockedRows, sums: Tensor, *, log_sums: Tensor, tau: float) -> Selection:
    """Tokens with a probability of at least tau. Blocks whose sum is below tau are not read.

    `sums`, [rows, blocks] float64, are changed in place: the head is subtracted, and those of the tail remain.
    """
    at, blocks = torch.nonzero(sums >= tau * _JUST_BELOW, as_tuple=True)
    inside = rows.probabilities(at, blocks, log_sums)
    taken = inside >= tau
    hits, offsets = torch.nonzero(taken, as_tuple=True)
    head = _sorted(at[hits], blocks[hits] * BLOCK + offsets, inside[hits, offsets])
    sums[at, blocks] = inside.masked_fill_(taken, 0).sum(1, dtype=torch.float64)
    return head


def _sorted(rows: Tensor, ids: Tensor, probabilities: Tensor) -> Selection:
    """By row, then by descending probability, then by ascending id. Probabilities are float32 and not negative."""
    if len(ids) and bool((ids[1:] < ids[:-1]).logical_and_(rows[1:] == rows[:-1]).any()):
        by_id = torch.argsort(ids, stable=True)
        rows, ids, probabilities = rows[by_id], ids[by_id], probabilities[by_id]
    # Floats of at least 0 are in the order of their bits as integers, so one int64 can hold row and probability.
    order = torch.argsort((rows << 32) - probabilities.view(torch.int32), stable=True)
    return Selection(rows=rows[order], ids=ids[order], probabilities=probabilities[order].double())


def sample_tail(rows: BlockedRows, sums: Tensor, uniforms: Tensor, *, log_sums: Tensor, tau: float) -> Selection:
    """Systematic sampling of the tail: token i is taken where floor(c_i / tau + u) > floor(c_(i-1) / tau + u).

    c_i is the running sum of the row's tail probabilities in id order, u the row's uniform number. Token i is taken
    with probability p_i / tau and has the weight tau (Duffield, Lund, Thorup: Learn more, sample less, 2005).
    So the entries are the tokens at which c first reaches (k - u) tau, for k = 1, 2, ...: the running sums over blocks
    give the block, and those within it the token.

    Args:
        rows: logits.
        sums: [rows, blocks] float64 of the tail.
        uniforms: [rows] float64 in [0, 1).
        log_sums: [rows] of the logits.
        tau: weight of each entry.
    """
    if not len(sums):
        return Selection(rows=sums.new_zeros(0).long(), ids=sums.new_zeros(0).long(), probabilities=sums.new_zeros(0))
    running = sums.cumsum(1)
    most = int(float(running[:, -1].max()) / tau) + 1
    wanted = (torch.arange(1, most + 1, device=sums.device) - uniforms[:, None]) * tau
    at, entry = torch.nonzero(wanted <= running[:, -1:], as_tuple=True)
    blocks = torch.searchsorted(running, wanted)[at, entry]
    mass = sums[at, blocks]
    into_block = wanted[at, entry] - running[at, blocks] + mass
    pieces = [
        _walk(rows, at[piece], blocks[piece], into_block[piece], mass[piece], log_sums=log_sums, tau=tau)
        for piece in torch.split(torch.arange(len(at), device=at.device), _ENTRIES_AT_ONCE)
    ]
    offsets, probabilities = (torch.cat([piece[which] for piece in pieces]) for which in (0, 1))
    ids = blocks * BLOCK + offsets
    # Rounding can hit an impossible token, or hit a token just below tau twice: such entries are dropped.
    kept = probabilities > 0
    kept[1:] &= (ids[1:] != ids[:-1]) | (at[1:] != at[:-1])
    return Selection(rows=at[kept], ids=ids[kept], probabilities=probabilities[kept])


def _walk(
    rows: BlockedRows, at: Tensor, blocks: Tensor, into_block: Tensor, mass: Tensor, *, log_sums: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Offset within its block, and probability, of the tail token at which the running sum reaches `into_block`."""
    inside = rows.probabilities(at, blocks, log_sums)
    inside.masked_fill_(inside >= tau, 0)
    walked = inside.cumsum(1, dtype=torch.float64)
    # The dense pass rounds differently in the seventh digit; the block's mass is that of the dense pass.
    reached = into_block * (walked[:, -1] / mass)
    offsets = torch.searchsorted(walked, reached[:, None]).clamp_(max=BLOCK - 1)
    return offsets[:, 0], inside.gather(1, offsets)[:, 0].double()
