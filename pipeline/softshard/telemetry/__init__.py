"""What a run reports while it works: to people on the console; to machines as JSON lines, metrics and lineage events.

The core takes a `Reporter`; `sinks` opens the reporters that a command asks for.
"""

from softshard.telemetry.console import ConsoleReporter
from softshard.telemetry.reporter import EventValue, FanOut, Progress, Reporter, SilentReporter

__all__ = ["ConsoleReporter", "EventValue", "FanOut", "Progress", "Reporter", "SilentReporter"]
