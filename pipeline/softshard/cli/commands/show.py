"""`softshard show`: one stored sequence, position by position."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument
from softshard.cli.command import Command
from softshard.cli.result import print_result
from softshard.cli.terminal import packed, wrapped

if TYPE_CHECKING:
    from softshard.output.stored_sequence import ShownSequence

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    parser.add_argument("--sequence", required=True, metavar="ID", help="id of the sequence, or its beginning")


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.output.stored_sequence import show_sequence

    shown = show_sequence(arguments.out, arguments.sequence)
    print_result(arguments, shown, _render(shown))
    return 0


def _render(shown: ShownSequence) -> str:
    """The sequence as lines of at most 80 columns."""
    lines = [
        f"sequence  {shown.sequence_id}",
        f"document  {shown.document_id}",
        *wrapped(f"source    {shown.source}, style {shown.style}, group {shown.group}"),
        f"part      {shown.part}",
        f"split     {shown.split}, scored by"
        + (" all teachers, averaged" if shown.fold < 0 else f" style teacher {shown.fold}"),
        "",
        *wrapped(shown.text),
        "",
        "Each label with its probability, entropy in nats and mass outside the head;",
        "below it the head with its probabilities"
        + (f" and, after +, the tail: {shown.tail_weight:.4f} each." if shown.tail_weight else "."),
        "",
    ]
    for position in shown.positions:
        label = textwrap.shorten(repr(position.label), 24, placeholder="…")
        lines.append(
            f"{position.place:5d}  {label:<24}  p {position.label_probability:<9.4g}"
            f" entropy {position.entropy_nats:5.2f}  tail {position.tail_mass:.3f}"
        )
        head = [f"{word!r} {weight:.3f}" for word, weight in position.head]
        tail = [f"{'' if index else '+ '}{word!r}" for index, word in enumerate(position.tail)]
        lines += packed([*head, *tail], indent=7)
    return "\n".join(lines) + "\n"


COMMAND = Command(
    name="show",
    help="show one stored sequence, position by position",
    add_arguments=_add_arguments,
    execute=_execute,
)
