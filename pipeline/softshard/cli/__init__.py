"""The command `softshard`."""

from __future__ import annotations

from softshard.cli.main import main

__all__ = ["main"]
