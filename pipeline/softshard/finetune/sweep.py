"""The trainings of a sweep side by side: the loss of each on the hold-out and on the retention text."""

from __future__ import annotations

from typing import Any

from softshard.finetune.record import Trained

__all__ = ["sweep_rows"]


def sweep_rows(trained: Trained) -> list[dict[str, Any]]:
    """One row per training, in the order of the grid, as plain values; empty without a sweep."""
    return [
        {
            "alpha": swept.training.alpha,
            "retention_weight": swept.training.retention_weight,
            "learning_rate": swept.training.learning_rate,
            "human_nll_nats": swept.training.holdout_nll_nats,
            "retention_nll_nats": swept.retention_nll_nats,
            "chosen": swept.training.folder == trained.adapter.folder,
        }
        for swept in trained.sweep
    ]
