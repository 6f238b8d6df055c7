"""Random inputs of the losses, and the losses position after position in float64, from their definitions."""

from __future__ import annotations

import numpy as np
import torch

from fakes.targets import sparse_targets
from softshard.finetune.loss import sparse_divergence, sparse_kl
from softshard.models.decoder import LogitTransform

NUM, WIDTH, VOCAB, PADDED = 9, 5, 17, 21
DOUBLE = torch.float64
DIVERGENCES = ["forward", "reverse", "jensen_shannon"]
BETA = 0.3
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.4),
    "capped": LogitTransform(soft_cap=1.7),
    "both": LogitTransform(scale=1.6, soft_cap=2.5),
}


def inputs(seed=0, *, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    shapes = (NUM, WIDTH), (PADDED, WIDTH), (PADDED,)
    items = [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes]
    return [item.to(dtype).requires_grad_() for item in items]


def heads(seed=0, *, num=NUM, alpha=0.0, ghost=True):
    """Random heads and the mass of the rest, of 1 in all; with alpha, a label's own entry before each head.

    Every third label is a token of its own head.
    """
    rng = np.random.default_rng(seed)
    ids, weights, own, counts, tails = [], [], [], [], []
    for position in range(num):
        probabilities = rng.dirichlet(np.full(VOCAB, 0.7))
        head = np.argsort(-probabilities)[: 1 + position % 6] if ghost else rng.permutation(VOCAB)
        label = int(head[0]) if position % 3 == 0 else int(rng.integers(VOCAB))
        labelled = [label] if alpha else []
        ids += [*labelled, *head.tolist()]
        weights += [*([alpha] if alpha else []), *((1 - alpha) * probabilities[head]).tolist()]
        own += [*([True] if alpha else []), *([False] * len(head))]
        counts.append(len(head) + len(labelled))
        tails.append((1 - alpha) * (1 - probabilities[head].sum()))
    return {
        "entry_ids": torch.tensor(ids, dtype=torch.int64),
        "entry_weights": torch.tensor(weights, dtype=DOUBLE),
        "entry_offsets": torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64),
        "entry_in_head": ~torch.tensor(own, dtype=torch.bool) if alpha else None,
        "tail_mass": torch.tensor(tails, dtype=DOUBLE) if ghost else None,
    }


def loss_of(divergence, hidden, weight, target, *, position_weights=None, **options):
    targets = sparse_targets(**target, position_weights=position_weights)
    common = {"num_valid": VOCAB, "chunk_positions": 4, **options}
    if divergence == "forward":
        return sparse_kl(hidden, weight, targets, **common)
    return sparse_divergence(hidden, weight, targets, divergence=divergence, jsd_beta=BETA, **common)


def reference(divergence, hidden, weight, target, *, bias=None, position_weights=None, transform=None, temperature=1.0):
    """Position after position, in float64, from the definitions."""
    z = (hidden.double() @ weight.double().T + (0 if bias is None else bias.double()))[:, :VOCAB]
    if transform is not None:
        z = z * transform.scale
        z = z if transform.soft_cap is None else transform.soft_cap * torch.tanh(z / transform.soft_cap)
    q = torch.softmax(z / temperature, dim=1)
    offsets, total = target["entry_offsets"].tolist(), torch.zeros((), dtype=DOUBLE)
    for position in range(len(hidden)):
        entries = range(offsets[position], offsets[position + 1])
        weight_of = 1.0 if position_weights is None else float(position_weights[position])
        if weight_of:
            of_position = _cells(target, entries, position, q[position])
            total = total + weight_of * _FORMULAS[divergence](*of_position)
    return temperature**2 * total


def _cells(target, entries, position, q):
    """[(P, Q)] of the cells, and of the entries outside the head that forward KL scores token by token."""
    ids, weights, flags = target["entry_ids"].tolist(), target["entry_weights"].tolist(), target["entry_in_head"]
    mass: dict[int, float] = {}
    outside: list[tuple[int, float]] = []
    for entry in entries:
        if flags is None or bool(flags[entry]):
            mass[ids[entry]] = mass.get(ids[entry], 0.0) + weights[entry]
        else:
            outside.append((ids[entry], weights[entry]))
    rest = [token for token in range(VOCAB) if token not in mass]
    ghost = 0.0 if target["tail_mass"] is None else float(target["tail_mass"][position])
    return mass, rest, ghost, outside, q


def _forward(mass, rest, ghost, outside, q):
    loss = -sum(share * q[token].log() for token, share in [*mass.items(), *outside])
    return loss - ghost * q[rest].sum().log() if ghost else loss


def _both(mass, rest, ghost, outside, q):
    mass = dict(mass)
    for token, share in outside:
        if token in mass:
            mass[token] += share
        else:
            ghost += share
    p = [torch.tensor(share, dtype=DOUBLE) for share in mass.values()]
    cells = [q[token] for token in mass]
    if rest:
        p.append(torch.tensor(ghost, dtype=DOUBLE))
        cells.append(q[rest].sum())
    return torch.stack(p), torch.stack(cells)


def _reverse(*of_position):
    p, q = _both(*of_position)
    return (q * (q / p).log()).sum()


def _jensen_shannon(*of_position):
    p, q = _both(*of_position)
    middle = BETA * p + (1 - BETA) * q
    return BETA * (p * (p / middle).log()).sum() + (1 - BETA) * (q * (q / middle).log()).sum()


_FORMULAS = {"forward": _forward, "reverse": _reverse, "jensen_shannon": _jensen_shannon}


def off(actual, expected):
    """Relative error of the worst of some tensors, each by its norm."""
    pairs = zip(actual, expected, strict=True)
    return max(float((one.detach().double() - other.detach()).norm() / other.detach().norm()) for one, other in pairs)
