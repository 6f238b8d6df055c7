"""What the documents say is run and compared."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from softshard.jobfile import load_job
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.storage import LocalStore
from softshard.target.entries import entries_of

ROOT = Path(__file__).parent.parent


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_ten_lines_of_the_format_decode_a_part_as_softshard_does(finished):
    (code,) = blocks("docs/format.md", "python")
    assert "softshard" not in code.replace('["softshard"]', "")
    scope = {}
    exec(code, scope)
    manifest = read_manifest(finished / "targets")
    for receipt in (manifest.parts[0], manifest.of_split("test")[0]):
        documented = list(scope["targets"](finished / "targets" / receipt.path))
        position = 0
        for (sequence, targets), metadata in read_rows(LocalStore(finished / "targets"), receipt):
            entries = entries_of(targets, tau=metadata.tau)
            for j, label in enumerate(sequence.labels):
                sequence_id, documented_label, ids, weights = documented[position]
                position += 1
                here = slice(entries.offsets[j], entries.offsets[j + 1])
                assert (sequence_id, documented_label) == (sequence.sequence_id, label)
                assert ids.tolist() == entries.ids[here].tolist()
                np.testing.assert_allclose(weights, entries.weights[here], rtol=1e-5)
        assert position == len(documented)


def test_format_page_names_every_column():
    from softshard.shard.schema import PART_SCHEMA

    page = (ROOT / "docs/format.md").read_text()
    assert all(f"`{name}`" in page for name in PART_SCHEMA.names)


def test_polars_lines_of_the_readme_run(finished, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    polars_code, loop_code = blocks("README.md", "python")
    scope = {}
    exec(polars_code, scope)
    assert len(scope["rows"]) == sum(
        part["num_sequences"] for part in scope["manifest"]["parts"] if part["split"] == "train"
    )
    assert isinstance(scope["rows"], pl.DataFrame)
    exec(loop_code, scope)
    assert scope["batch"].entry_weights.numel() > 0


def test_lines_on_reading_targets_run(finished, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in blocks("docs/reading.md", "python"):
        exec(code, scope)
    assert scope["again"].state_dict() == scope["data"].state_after(scope["first"])
    assert (scope["state"]["epoch"], scope["state"]["consumed"]) == (1, 0), "the end of an epoch"
    assert sorted(scope["packed"].plan(0).order.tolist()) == sorted(scope["data"].plan(1).order.tolist())


@pytest.mark.parametrize("command", "run plan status verify show".split())  # noqa: SIM905
def test_readme_shows_every_command_a_user_needs(command):
    assert f"softshard {command} " in (ROOT / "README.md").read_text()


def test_smallest_job_of_the_reference_is_a_job(tmp_path):
    (code,) = blocks("docs/job.md", "yaml")
    (tmp_path / "job.yaml").write_text(code)
    assert load_job(tmp_path / "job.yaml", check_paths=False).name == "mine"


def test_job_of_the_readme_is_a_job(tmp_path):
    (code,) = blocks("README.md", "yaml")
    (tmp_path / "job.yaml").write_text(code)
    assert load_job(tmp_path / "job.yaml", check_paths=False).corpus.sources[0].rights_basis == "public-domain"


def test_demo_job_is_a_job():
    job = load_job(ROOT / "jobs/demo.yaml", check_paths=False)
    assert job.out == "runs/demo"
    assert job.train.alpha <= 0.5
    assert job.train.baseline is not None
    assert len(job.train.baseline.learning_rates) == 3


def test_example_finds_a_part_to_say_what_its_teacher_says(finished):
    command = [sys.executable, str(ROOT / "examples/compare_part_with_teacher.py"), str(finished), "--sequences", "12"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("12 sequences")


def test_schemas_describe_what_a_run_leaves(finished):
    for name, file in (
        ("manifest", next((finished / "targets/manifests").glob("*.json"))),
        ("report", finished / "report/metrics.json"),
    ):
        schema = json.loads((ROOT / f"schemas/{name}.schema.json").read_text())
        content = json.loads(file.read_text())
        assert set(schema["required"]) <= set(content) <= set(schema["properties"])


def test_no_document_has_a_place_that_was_to_be_filled_in():
    for page in (*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")):
        assert not re.search(r"^[A-Z]{5,}$", page.read_text(), flags=re.MULTILINE), page.name
