"""Bad inputs and mistakes: each ends with the exit code and the line that docs/reliability.md and mistakes.md say."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

# As a script this file writes the page's table.
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import bad_outputs, bad_sources, first_steps
from faults.bad_inputs import Case, Place, Section
from softshard.cli import main

DOCS = Path(__file__).parents[2] / "docs"
OPENING, CLOSING = "<!-- bad inputs: `python tests/faults/test_bad_inputs.py` -->\n", "<!-- end of bad inputs -->\n"
PAGES = {"reliability.md": (*bad_outputs.SECTIONS, *bad_sources.SECTIONS), "mistakes.md": first_steps.SECTIONS}
WAS_HERE = Path("/tmp/softshard-was-here")


def cases(page: str) -> list[Case]:
    return [case for section in PAGES[page] for case in section.cases]


def table(sections: tuple[Section, ...]) -> str:
    """A page's part on bad inputs."""
    return "\n".join(line for section in sections for line in section.lines())


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


@pytest.fixture
def first_day(finished, tiny_model, scheduler, tmp_path):
    """A folder for a first job, and an output that is not to be changed."""
    (tmp_path / "in").mkdir()
    return Place(finished=finished, out=finished, folder=tmp_path / "in", scheduler=scheduler, model=tiny_model)


@pytest.mark.parametrize("case", cases("reliability.md"), ids=lambda case: case.what)
def test_bad_input_ends_as_the_page_says(case, place, capsys):
    assert_ends_as_said(case, place, capsys)


@pytest.mark.parametrize("case", cases("mistakes.md"), ids=lambda case: case.what)
def test_mistake_of_the_first_day_ends_as_the_page_says(case, first_day, capsys):
    assert_ends_as_said(case, first_day, capsys)


def assert_ends_as_said(case, place, capsys):
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


@pytest.mark.parametrize(("page", "least"), [("reliability.md", 40), ("mistakes.md", 25)])
def test_page_has_the_table_of_these_cases(page, least):
    assert len(cases(page)) >= least
    text = (DOCS / page).read_text()
    assert text.partition(OPENING)[2].partition(CLOSING)[0] == table(PAGES[page])


def test_every_test_that_the_page_names_is_there():
    tests = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (DOCS / "reliability.md").read_text())
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in tests] == []


if __name__ == "__main__":
    for name, sections in PAGES.items():
        page = DOCS / name
        before, _, rest = page.read_text().partition(OPENING)
        page.write_text(before + OPENING + table(sections) + CLOSING + rest.partition(CLOSING)[2])
        sys.stdout.write(f"{name}: {len(cases(name))} bad inputs\n")
