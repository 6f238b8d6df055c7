"""The old name of `python -m benchmarks.ingest`, with the same arguments."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
runpy.run_module("benchmarks.ingest", run_name="__main__", alter_sys=True)
