"""What `softshard status` prints."""

from __future__ import annotations

from softshard.cli.sweep import render_sweep
from softshard.output.status import Status

__all__ = ["render_status"]


def render_status(status: Status) -> str:
    """The state as lines of at most 80 columns."""
    lines = [f"{status.out}: job {status.job}", ""]
    for stage in status.stages:
        lines.append(f"{stage.stage:<9} {'complete' if stage.complete else 'not complete'}")
        for name, value in stage.figures.items():
            if name == "sweep":
                lines += render_sweep(value)
                continue
            shown = f"{value:,}" if isinstance(value, int | float) else str(value)
            lines.append(f"{'':<9} {name.replace('_', ' '):<24} {shown}")
    if status.sequences:
        lines += ["", "One of its sequences:", f"softshard show {status.out} --sequence {status.sequences[0][:12]}"]
    return "\n".join(lines) + "\n"
