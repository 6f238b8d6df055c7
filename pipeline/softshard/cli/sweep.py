"""The table of a sweep, for a terminal."""

from __future__ import annotations

from typing import Any

__all__ = ["render_sweep"]

_MEASURED = ("human_nll_nats", "retention_nll_nats")


def render_sweep(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of at most 80 columns; `*` marks the chosen one."""
    lines = [f"  {'alpha':>8}{'lambda':>10}{'learning rate':>16}{'hold-out NLL':>15}{'retention NLL':>16}"]
    for row in rows:
        nll, kept = (f"{row[name]:.4f}" if row[name] is not None else "-" for name in _MEASURED)
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{mark} {row['alpha']:>8g}{row['retention_weight']:>10g}{row['learning_rate']:>16g}{nll:>15}{kept:>16}"
        )
    lines.append(f"* the best of {len(rows)} trainings on this same hold-out, which favours it")
    return lines
