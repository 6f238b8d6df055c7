"""Bad inputs: every one ends with the exit code and the line that docs/reliability.md says it does."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

# As a script this file writes the page's table.
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import bad_outputs, bad_sources
from faults.bad_inputs import Place
from softshard.cli import main

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
OPENING, CLOSING = "<!-- bad inputs: `python tests/faults/test_bad_inputs.py` -->\n", "<!-- end of bad inputs -->\n"
SECTIONS = (*bad_outputs.SECTIONS, *bad_sources.SECTIONS)
CASES = [case for section in SECTIONS for case in section.cases]
WAS_HERE = Path("/tmp/softshard-was-here")


def table():
    """The page's part on bad inputs."""
    return "\n".join(line for section in SECTIONS for line in section.lines())


@pytest.fixture
def place(finished, tiny_model, scheduler, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["out"] = str(tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    (tmp_path / "out/job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    out, folder = tmp_path / "out", tmp_path / "in"
    place = Place(finished=finished, out=out, folder=folder, scheduler=scheduler, model=tiny_model)
    with place.undo:
        yield place


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_ends_as_the_page_says(case, place, capsys):
    case.make(place)
    capsys.readouterr()
    command = case.command.replace("OUT", str(place.out)).replace("IN/", f"{place.folder}/")
    code = main(shlex.split(command))
    output, errors = capsys.readouterr()
    said = [line.removeprefix("softshard: ") for line in (output + errors).splitlines()]
    assert code == case.code, said
    assert any(case.is_said_in(line, place) for line in said), said
    assert "Traceback" not in errors
    failed = [line for line in errors.splitlines() if line.startswith("softshard: ")]
    assert len(failed) == (code != 0 and not output)
    assert not WAS_HERE.exists()
    for look in place.then:
        look()


def test_page_has_the_table_of_these_cases():
    assert len(CASES) >= 40
    text = PAGE.read_text()
    assert text.partition(OPENING)[2].partition(CLOSING)[0] == table()


def test_every_test_that_the_page_names_is_there():
    tests = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE.read_text())
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in tests] == []


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(OPENING)
    PAGE.write_text(before + OPENING + table() + CLOSING + rest.partition(CLOSING)[2])
    sys.stdout.write(f"{PAGE.name}: {len(CASES)} bad inputs\n")
