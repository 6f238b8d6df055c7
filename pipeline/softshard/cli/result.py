"""What a command writes to stdout: its result, as text or as one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

__all__ = ["print_result", "write_stdout"]


def print_result(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """Print a result: `value` (a dataclass or plain values) as JSON with `--json`, otherwise `text`."""
    if arguments.json:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        text = json.dumps(plain, ensure_ascii=False) + "\n"
    write_stdout(text)


def write_stdout(text: str) -> None:
    """Write to stdout; a reader that closes the pipe early, such as `head`, is not an error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
