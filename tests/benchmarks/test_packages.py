"""Every benchmark is a package with a command line, under its old script name too, and CONTRIBUTING lists it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(main.parent.name for main in ROOT.glob("benchmarks/*/__main__.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_answers_help_with_its_question(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}.__main__").main()
    assert ended.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    assert f"usage:python-mbenchmarks.{name}[" in text
    question = importlib.import_module(f"benchmarks.{name}.measure").__doc__.partition("\n")[0]
    assert question.endswith("?")
    assert question.replace(" ", "") in text


def test_the_table_in_contributing_lists_every_benchmark():
    table = re.findall(r"^\| `(\w+)` \| .+\? \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(table) == NAMES


def test_every_benchmark_has_its_script_name():
    scripts = sorted(path.stem for path in ROOT.glob("benchmarks/*.py") if path.stem != "__init__")
    assert scripts == NAMES


def test_module_and_script_are_the_same_command(tmp_path):
    for command, folder in (
        (["-m", "benchmarks.verification"], ROOT),
        ([ROOT / "benchmarks/verification.py"], tmp_path),
    ):
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("usage: python -m benchmarks.verification"), command
