"""The trainings of a sweep side by side: what each reached on the hold-out, and what it costs on the retention text."""

from __future__ import annotations

from typing import Any

from softshard.finetune.record import Trained

__all__ = ["sweep_rows"]


def sweep_rows(trained: Trained) -> list[dict[str, Any]]:
    """A row a training, in the order of the grid, as plain values; empty without a sweep."""
    return [
        {
            "alpha": one.training.alpha,
            "retention_weight": one.training.retention_weight,
            "learning_rate": one.training.learning_rate,
            "human_nll_nats": one.training.holdout_nll_nats,
            "retention_nll_nats": one.retention_nll_nats,
            "chosen": one.training.folder == trained.adapter.folder,
        }
        for one in trained.sweep
    ]
