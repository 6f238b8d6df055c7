"""What a run says while it works: to people on the console, to machines as JSON lines, metrics and lineage events."""

from softshard.telemetry.console import ConsoleReporter
from softshard.telemetry.reporter import EventValue, FanOut, Progress, Reporter, SilentReporter

__all__ = ["ConsoleReporter", "EventValue", "FanOut", "Progress", "Reporter", "SilentReporter"]
