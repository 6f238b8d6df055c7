"""What all benchmarks share: the command line and its record, and positions of real prose under real models."""

from benchmarks.harness.positions import ModelName, Positions, middle_states, positions
from benchmarks.harness.runner import RESULTS, Options, Result, WrongAnswer, interleaved, require, run, say, say_table

__all__ = [
    "RESULTS",
    "ModelName",
    "Options",
    "Positions",
    "Result",
    "WrongAnswer",
    "interleaved",
    "middle_states",
    "positions",
    "require",
    "run",
    "say",
    "say_table",
]
