"""What the documents say is run and compared."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fakes.ranks import on_ranks
from fakes.targets import row, write_targets
from softshard.config.job_file import load_job
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.shard.read import read_rows
from softshard.sketch.entries import entries_of
from softshard.storage import LocalStore

ROOT = Path(__file__).parents[2]


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
    from softshard.shard.schema import PART_SCHEMAS

    page = (ROOT / "docs/format.md").read_text()
    assert all(f"`{name}`" in page for schema in PART_SCHEMAS.values() for name in schema.names)


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
    assert sorted(scope["packed"].epoch_order(0).rows.tolist()) == sorted(scope["data"].epoch_order(1).rows.tolist())


@pytest.fixture
def desk(finished, tmp_path):
    """A folder to work in, with the output of the tiny job and targets of another kind."""
    (tmp_path / "runs/topk/targets").mkdir(parents=True)
    (tmp_path / "runs/demo").symlink_to(finished)
    rng = np.random.default_rng(0)
    parts = [[row(f"{number:032d}", 9, rng, kind="topk") for number in range(5)]]
    write_manifest(*write_targets(tmp_path / "runs/topk/targets", parts, kind="topk"))
    return tmp_path


def test_lines_on_integrations_run_in_one_process(desk, tiny_model, monkeypatch):
    monkeypatch.chdir(desk)
    shared, *others = blocks("docs/integrations.md", "python")
    scope = {"MODEL": str(tiny_model), "__name__": "lines"}
    for code in (shared, *others):
        exec(code, scope)
    assert scope["loss"].requires_grad
    assert scope["rows"].num_rows == len(scope["data"].epoch_order(0).rows)
    assert pl.read_parquet("rows.parquet").height == 5
    assert list(Path("trained").glob("checkpoint-*/softshard.json"))
    assert scope["trainer"].state.global_step == 2


def run_together(rank, codes, folder, model):
    os.chdir(folder)
    for code in codes:
        scope = {"MODEL": model}
        exec(code, scope)
        steps = [None, None]
        weight = float(scope["weight_of_step"](scope["features"]))
        torch.distributed.all_gather_object(steps, (weight, len(scope["data"])))
        assert steps[0] == steps[1]
        assert all(item.isfinite().all() for item in scope["model"].parameters())


def test_lines_on_integrations_run_in_two_processes(desk, tiny_model):
    shared = blocks("docs/integrations.md", "python")[0]
    codes = [shared + code for code in blocks("docs/integrations.md", "python two processes")]
    assert len(codes) == 3
    on_ranks(run_together, 2, codes, desk, str(tiny_model))


@pytest.mark.slow
def test_torchrun_goes_on_with_other_numbers_of_processes_as_if_it_had_not_stopped(desk, tiny_model):
    def run(command, state):
        words = command.replace("MODEL", str(tiny_model)).replace("examples/", f"{ROOT}/examples/").split()
        settings = ["--batch-tokens", "256", "--learning-rate", "0.01", "--state", str(desk / state)]
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *settings]
        result = subprocess.run(command, capture_output=True, text=True, cwd=desk)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    (lines,) = blocks("docs/integrations.md", "sh")
    commands = lines.splitlines()
    assert [command.split()[3] for command in commands] == ["2", "1", "3"]
    stopped = [step for command in commands for step in run(command, "stopped.pt")]
    whole = run(commands[1].replace("--steps 6", "--steps 8"), "whole.pt")
    assert [step["step"] for step in whole] == list(range(1, 9))
    assert len({step["epoch"] for step in whole}) > 1, "over the end of an epoch"
    assert [(step["step"], step["epoch"], step["batches"]) for step in stopped] == [
        (step["step"], step["epoch"], step["batches"]) for step in whole
    ]
    np.testing.assert_allclose([step["loss"] for step in stopped], [step["loss"] for step in whole], rtol=1e-4)
    ends = [torch.load(desk / name, weights_only=True) for name in ("stopped.pt", "whole.pt")]
    for name, item in ends[1]["adapter"].items():
        torch.testing.assert_close(ends[0]["adapter"][name], item, rtol=1e-2, atol=1e-4)


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
    assert job.train.alpha == 0.75
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
