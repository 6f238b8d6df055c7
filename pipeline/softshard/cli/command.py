"""A subcommand of `softshard`: its name, its help, its arguments and the function that executes it.

A module in `commands/` defines one and `commands/registry.py` lists it. All of these modules are imported for
`softshard --help`, so they import torch, pyarrow and the stages only inside their functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand."""

    name: str
    help: str
    """A phrase in the imperative, without a full stop."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds the command's own arguments; every command also gets `--json` and `--debug`."""
    execute: Callable[[argparse.Namespace], int]
    """Executes the command and returns the exit code."""
