"""A sweep from one job: every combination is trained on the same targets, and the best on the hold-out is taken."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from softshard.cli import main
from softshard.cli.commands.run import render_summary
from softshard.config.job_file import load_job
from softshard.errors import JobInvalid
from softshard.finetune.record import read_trained
from softshard.stages import STAGES
from softshard.stages.job import run_job
from softshard.stages.train.trainings import count_trainings
from softshard.telemetry import SilentReporter

GRID = {"alpha": [0.2, 0.8], "retention_weight": [0.0, 0.5]}


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
    """Job file of a sweep that has run, and what it came to."""
    folder = tmp_path_factory.mktemp("swept")
    shutil.copytree(finished, folder / "out")
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["out"] = str(folder / "out")
    job["train"] |= {"baseline": None, "sweep": GRID}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path, run_job(load_job(path), SilentReporter())


def test_every_combination_is_trained_and_the_least_loss_on_the_hold_out_is_taken(swept):
    _, outcome = swept
    trained = outcome.trained
    settings = [(one.training.alpha, one.training.retention_weight) for one in trained.sweep]
    assert settings == [(0.2, 0.0), (0.2, 0.5), (0.8, 0.0), (0.8, 0.5)]
    losses = {one.training.folder: one.training.holdout_nll_nats for one in trained.sweep}
    assert losses[trained.adapter.folder] == min(losses.values())
    assert len(set(losses.values())) == 4


def test_no_target_is_computed_again(swept, finished):
    path, outcome = swept
    before, after = (
        {file.name: file.stat().st_mtime_ns for file in (root / "targets" / "data").rglob("*.parquet")}
        for root in (finished, path.parent / "out")
    )
    assert before == after
    assert outcome.manifest.digest == json.loads((finished / "targets" / "manifest.json").read_text())["digest"]


def test_the_reports_adapter_is_the_chosen_one_and_its_cost_is_that_of_the_table(swept):
    _, outcome = swept
    (chosen,) = (row for row in outcome.report.sweep if row.chosen)
    assert chosen.human_nll_nats == pytest.approx(outcome.report.adapter.human_nll_nats, abs=1e-6)
    assert chosen.retention_nll_nats == pytest.approx(outcome.report.adapter.retention_nll_nats, abs=1e-6)


def test_the_table_stands_in_the_report_the_status_and_the_summary(swept, capsys):
    path, outcome = swept
    page = (path.parent / "out" / "report" / "index.html").read_text()
    assert "Trainings of the sweep" in page
    assert "trainings on this same hold-out, which favours it" in page
    assert "the best of 4 trainings on this same hold-out, which favours it" in render_summary(outcome)
    card = (path.parent / "out" / "adapter" / outcome.trained.adapter.folder / "README.md").read_text()
    assert "One of 4 trainings. The best on this hold-out was chosen" in card
    assert main(["status", outcome.out]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith(("*", "  ")) and "0.5" in line]
    assert len(lines) >= 2
    assert sum(line.startswith("*    ") for line in shown.splitlines()) == 1
    assert "* the best of 4 trainings on this same hold-out" in shown
    assert max(len(line) for line in shown.replace(outcome.out, "OUT").splitlines()) <= 80
    assert main(["status", "--json", outcome.out]) == 0
    (train,) = (stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["stage"] == "train")
    assert [row["alpha"] for row in train["figures"]["sweep"]] == [0.2, 0.2, 0.8, 0.8]


def test_a_sweep_goes_on_with_what_is_missing(swept, tmp_path):
    path, outcome = swept
    shutil.copytree(outcome.out, tmp_path / "out")
    job = yaml.safe_load(path.read_text())
    job["out"] = str(tmp_path / "out")
    again = tmp_path / "job.yaml"
    again.write_text(yaml.safe_dump(job))
    lost, *kept = (one.training.folder for one in outcome.trained.sweep)
    (tmp_path / "out" / "adapter" / lost / "receipt.json").unlink()
    times = {name: (tmp_path / "out" / "adapter" / name / "receipt.json").stat().st_mtime_ns for name in kept}
    second = run_job(load_job(again), SilentReporter(), stages=STAGES[:4])
    assert second.trained == outcome.trained
    assert times == {name: (tmp_path / "out" / "adapter" / name / "receipt.json").stat().st_mtime_ns for name in kept}


def test_another_sweep_reuses_the_trainings_that_it_shares(swept, tmp_path):
    path, outcome = swept
    shutil.copytree(outcome.out, tmp_path / "out")
    job = yaml.safe_load(path.read_text())
    job["out"] = str(tmp_path / "out")
    job["train"]["sweep"] = {"alpha": [0.8, 0.5], "retention_weight": [0.5]}
    again = tmp_path / "job.yaml"
    again.write_text(yaml.safe_dump(job))
    run_job(load_job(again), SilentReporter(), stages=STAGES[:4])
    folders = {one.training.folder for one in read_trained_in(tmp_path / "out").sweep}
    assert outcome.trained.sweep[3].training.folder in folders
    assert len(folders - {one.training.folder for one in outcome.trained.sweep}) == 1


def test_a_point_of_the_sweep_that_is_the_baseline_is_trained_once(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    before = {name.name for name in (tmp_path / "out" / "adapter").iterdir()}
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["out"] = str(tmp_path / "out")
    job["train"]["sweep"] = {"alpha": [1.0], "retention_weight": [0.0], "learning_rate": [1e-3, 2e-3]}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    trained = run_job(load_job(path), SilentReporter(), stages=STAGES[:4]).trained
    shared, other = (one.training for one in trained.sweep)
    assert shared in trained.candidates
    assert other not in trained.candidates
    assert {name.name for name in (tmp_path / "out" / "adapter").iterdir()} - before == {other.folder}
    assert count_trainings(load_job(path).train) == len({one.folder for one in (*trained.candidates, other)})


def read_trained_in(out):
    from softshard.storage import LocalStore

    return read_trained(LocalStore(out / "adapter"))


def test_a_sweep_without_a_hold_out_is_refused_before_anything_runs(tiny_job, tmp_path):
    path = tiny_job(tmp_path, corpus={"holdout_fraction": 0.0}, train={"baseline": None, "sweep": GRID})
    with pytest.raises(JobInvalid, match="holdout_fraction"):
        run_job(load_job(path), SilentReporter(), stages=STAGES[:4])
    assert not (tmp_path / "out").exists()
