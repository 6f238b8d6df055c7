"""The students that `measure.py` compares: their inputs, their architecture, and training them side by side.

In: a teacher's positions, frozen states of one of its layers, and a kind of target for each student. Out: trained
students. Guaranteed: students of one seed start from the same weights and see the same positions in the same order, so
that only their targets differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness import Positions
from benchmarks.student.targets import Batch, Target, TargetKind
from softshard.data.sparse_targets import SparseTargets
from softshard.finetune.loss import dense_kl, sparse_kl

__all__ = ["BATCH_POSITIONS", "LEARNING_RATE", "Student", "StudyData", "batches", "divergence", "train"]

LEARNING_RATE = 1e-4
BATCH_POSITIONS = 64
_GATED_WIDTH = 1536


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """The inputs of students, and which rows are held out."""

    teacher: Positions
    inputs: Tensor
    """[N, D] frozen states, each dimension of mean 0 and deviation 1 over the first positions."""
    num_start: int
    """Rows before this one initialise the student; their targets are not trained on."""
    end_train: int
    """Rows from here on are other speeches."""

    @property
    def num_train(self) -> int:
        return self.end_train - self.num_start

    def logits(self, rows: Tensor) -> Tensor:
        return self.teacher.states[rows] @ self.teacher.output.T


class Student(nn.Module):
    """Frozen states [n, D] to last hidden states [n, D]."""

    def __init__(self, data: StudyData, *, seed: int) -> None:
        super().__init__()
        width = data.inputs.shape[1]
        given = data.teacher.states[: data.num_start]
        self.norm = nn.RMSNorm(width)
        self.norm.weight.data = given.square().mean(0).sqrt()
        self.linear = nn.Linear(width, width)
        self.linear.weight.data, self.linear.bias.data = _nearest_map(
            data.inputs[: data.num_start], given / self.norm.weight.data
        )
        generator = torch.Generator().manual_seed(seed)
        self.gate, self.up = (nn.Linear(width, _GATED_WIDTH, bias=False) for _ in range(2))
        for layer in (self.gate, self.up):
            nn.init.normal_(layer.weight, std=width**-0.5, generator=generator)
        self.down = nn.Linear(_GATED_WIDTH, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        gated = nn.functional.silu(self.gate(inputs)) * self.up(inputs)
        hidden: Tensor = self.norm(self.linear(inputs) + self.down(gated))
        return hidden


def _nearest_map(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map of least squares, with a ridge of 10."""
    known = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    ridge = 10 * torch.eye(known.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(known.T @ known + ridge, known.T @ outputs.double()).float()
    return solved[:-1].T.contiguous(), solved[-1].clone()


class StudentTraining:
    """A student, its kind of target and its optimiser."""

    def __init__(self, data: StudyData, kind: TargetKind, *, seed: int, num_steps: int) -> None:
        self.student, self._data, self._kind = Student(data, seed=seed), data, kind
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, max_lr=LEARNING_RATE, total_steps=num_steps, pct_start=0.1
        )

    def step(self, batch: Batch, *, epoch: int) -> None:
        hidden = self.student(self._data.inputs[batch.rows])
        target = self._kind.target(batch, epoch % self._kind.num_draws)
        self._optimizer.zero_grad()
        (divergence(self._data.teacher, hidden, batch.rows, target) / len(batch.rows)).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()


def divergence(teacher: Positions, hidden: Tensor, rows: Tensor, target: Target | None) -> Tensor:
    """The package's own loss, summed over the rows; without a target the teacher's whole distribution is it."""
    if target is None:
        return dense_kl(
            hidden,
            teacher.states[rows],
            teacher.output,
            num_valid=teacher.vocab_size,
            chunk_positions=BATCH_POSITIONS,
        )
    return sparse_kl(
        hidden,
        teacher.output,
        SparseTargets(
            entry_ids=target.ids,
            entry_weights=target.weights,
            entry_offsets=target.offsets,
            tail_mass=target.ghost_mass,
            position_weights=torch.ones(len(rows), device=hidden.device),
        ),
        num_valid=teacher.vocab_size,
        chunk_positions=BATCH_POSITIONS,
    )


def batches(data: StudyData, *, num_rows: int, epochs: int, num_draws: int, seed: int) -> Iterator[tuple[int, Batch]]:
    """The first rows to train on, in an order of each epoch's own, in whole batches, with the epoch."""
    order = torch.Generator().manual_seed(seed)
    uniforms = data.teacher.uniforms(seed=seed, num_draws=num_draws)
    for epoch in range(epochs):
        shuffled = data.num_start + torch.randperm(num_rows, generator=order)
        for rows in shuffled[: num_rows - num_rows % BATCH_POSITIONS].split(BATCH_POSITIONS):
            yield (
                epoch,
                Batch(
                    rows=rows,
                    logits=data.logits(rows),
                    labels=data.teacher.labels[rows],
                    places=[data.teacher.places[row] for row in rows.tolist()],
                    uniforms=uniforms[:, rows.numpy()],
                    seed=seed,
                ),
            )


def train(
    data: StudyData, kinds: Mapping[str, TargetKind], *, num_rows: int, epochs: int, seed: int
) -> dict[str, Student]:
    """One student per kind of target, all at the same steps."""
    num_steps = epochs * (num_rows // BATCH_POSITIONS)
    trainings = {name: StudentTraining(data, kind, seed=seed, num_steps=num_steps) for name, kind in kinds.items()}
    num_draws = max(kind.num_draws for kind in kinds.values())
    for epoch, batch in batches(data, num_rows=num_rows, epochs=epochs, num_draws=num_draws, seed=seed):
        for training in trainings.values():
            training.step(batch, epoch=epoch)
    return {name: training.student.eval() for name, training in trainings.items()}
