"""`softshard blend`: what the targets of several outputs hold together, as a mix or as a blend."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from softshard.cli.arguments import positive_number
from softshard.cli.command import Command
from softshard.cli.result import print_result

if TYPE_CHECKING:
    from softshard.data.blend_summary import BlendSummary

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("outs", metavar="OUT", nargs="+", help="output folders of jobs")
    parser.add_argument(
        "--weights", type=positive_number, nargs="+", metavar="W", help="a weight for each output (default: equal)"
    )


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.data.blend_summary import summarize_blend

    summary = summarize_blend(arguments.outs, weights=arguments.weights)
    print_result(arguments, summary, _render(summary))
    return 0


def _render(summary: BlendSummary) -> str:
    lines = []
    for target_set in summary.sets:
        lines += [
            f"{target_set.uri}: {target_set.kind}, {target_set.num_sequences:,} sequences,"
            f" {target_set.num_tokens:,} tokens",
            f"  share {target_set.share:.1%};"
            f" in a mix each sequence is seen {target_set.times_seen:.2f} times per epoch",
            f"  entropy {target_set.mean_entropy_nats:.3f} nats,"
            f" label log-probability {target_set.mean_label_logprob_nats:.3f} nats",
        ]
    if summary.can_mix:
        lines.append(f"mix: {summary.num_tokens:,} tokens per epoch")
    for style, tokens in summary.tokens_by_style.items():
        lines.append(f"  {style}: {tokens:,} tokens, {tokens / summary.num_tokens:.1%}")
    if summary.blend_entropy_nats is not None:
        lines.append(
            f"blend: {summary.num_common:,} sequences in all sets;"
            f" entropy at least {summary.blend_entropy_nats:.3f} nats"
        )
        if summary.needs is not None:
            lines.append(f"  needs {summary.needs}")
    elif not summary.can_mix:
        lines.append("neither mix nor blend: the targets have different temperatures")
    else:
        lines.append(f"blend: not possible, {summary.num_common:,} sequences are in all sets")
        lines += [f"  {each.uri} lacks {each.num_missing:,}" for each in summary.sets if each.num_missing]
    return "\n".join(lines) + "\n"


COMMAND = Command(
    name="blend",
    help="say what the targets of several outputs hold together",
    add_arguments=_add_arguments,
    execute=_execute,
)
