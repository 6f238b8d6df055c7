"""The command `softshard`: arguments in, one stage or the whole job out, and what people see of it."""

from __future__ import annotations

from softshard.cli.main import main

__all__ = ["main"]
