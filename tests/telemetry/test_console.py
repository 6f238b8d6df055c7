"""What a person at a terminal sees of a run."""

import re
import sys

import pytest

from softshard.telemetry.console import ConsoleReporter

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVEMENT = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
TIMES = re.compile(r"\d:\d\d:\d\d (\d:\d\d:\d\d|-:--:--)$")


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal of the given width."""

    def make(columns):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_bar_keeps_elapsed_time_and_time_to_go_on_the_line(terminal, capsys, columns):
    terminal(columns)
    with ConsoleReporter().progress(
        "train baseline 0.0005, alpha 0.75, lambda 0.1", total=2000, unit="steps"
    ) as update:
        update(1234, note="loss 3.123, on the retention text 2.456")
    shown = MOVEMENT.sub("\n", COLOUR.sub("", capsys.readouterr().err))
    lines = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert len(lines[-1]) <= columns
    assert TIMES.search(lines[-1])
    assert "1,234/2,000" in lines[-1]
    assert lines[-1].startswith("train baseline")
