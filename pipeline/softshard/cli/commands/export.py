"""`softshard export`: merge a trained adapter into its base and write a plain model folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from softshard.cli.arguments import add_out_argument
from softshard.cli.command import Command
from softshard.cli.result import print_result

if TYPE_CHECKING:
    from softshard.stages.export import Exported

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out_argument(parser)
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new or empty folder for the model")
    parser.add_argument(
        "--dtype",
        choices=("base", "float32"),
        default="base",
        help="data type of the weights: that of the base model (base, the default) or float32",
    )


def _execute(arguments: argparse.Namespace) -> int:
    from softshard.stages.export import export_model

    exported = export_model(arguments.out, arguments.to, dtype=arguments.dtype)
    print_result(arguments, exported, _render(exported))
    return 0


def _render(exported: Exported) -> str:
    return (
        f"{exported.folder}: {exported.base} with adapter {exported.adapter[:16]} ({exported.kind}), {exported.dtype}\n"
        f"mean KL on a known text: {exported.canary_kl_nats:.4g} nats per token from the base,"
        f" {exported.rounding_kl_nats:.2g} from base and adapter;"
        f" merging changed a logit by at most {exported.merge_difference:.2g}\n"
    )


COMMAND = Command(
    name="export",
    help="merge the adapter into its base and write a plain model folder",
    add_arguments=_add_arguments,
    execute=_execute,
)
