"""The trainings of a sweep side by side: what each reached on the hold-out, and what it costs on the retention text."""

from __future__ import annotations

from typing import Any

from softshard.train.record import Trained

__all__ = ["render_sweep", "sweep_rows"]

_MEASURED = ("human_nll_nats", "retention_nll_nats")


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


def render_sweep(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of at most 80 columns, and how one of them was chosen, which `*` marks."""
    lines = [f"  {'alpha':>8}{'lambda':>10}{'learning rate':>16}{'hold-out NLL':>15}{'retention NLL':>16}"]
    for row in rows:
        nll, kept = (f"{row[name]:.4f}" if row[name] is not None else "-" for name in _MEASURED)
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{mark} {row['alpha']:>8g}{row['retention_weight']:>10g}{row['learning_rate']:>16g}{nll:>15}{kept:>16}"
        )
    lines.append(f"* the best of {len(rows)} trainings on this very hold-out, which favours it")
    return lines
