"""The GPU's benchmark where there is no GPU: it says so, and its rehearsal runs and leaves no record."""

import json
import shutil
import sys

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu_capture import measure as gpu_capture
from benchmarks.harness import runner


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def command(results, monkeypatch):
    """`run` of a benchmark that offers a GPU and a CPU, with these arguments."""

    def call(measure, *arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_capture", *arguments])
        return harness.run("gpu_capture", measure, devices=("cuda", "cpu"))

    return call


@pytest.fixture
def cache(tmp_path, tiny_model, texts):
    """Materials as jobs/materials.py leaves them, with the tiny model."""
    shutil.copytree(tiny_model, tmp_path / "cache/SmolLM2-135M-Instruct")
    rows = [{"text": " ".join(texts[start:] + texts[:start]), "id": str(start), "group": "0"} for start in range(12)]
    (tmp_path / "cache/speeches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("SmolLM2-135M-Instruct", "speeches.jsonl"):
        (tmp_path / f"cache/{name}.stamp").write_text("{}")
    return tmp_path / "cache"


def named(options):
    return harness.Result(figures={"on_cpu": float(options.device == "cpu")}, details={})


def test_without_a_gpu_it_ends_with_2_and_one_line(command, results, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(gpu_capture.measure) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu_capture: --device cuda: no CUDA device is visible to torch")
    assert not results.exists()


def test_a_full_run_is_recorded_on_the_first_device_alone(command, results, capsys):
    assert command(named, "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"on_cpu": 1}
    assert not results.exists()
    assert command(named) == 0
    assert json.loads((results / "gpu_capture.json").read_text())["figures"] == {"on_cpu": 0}


def test_its_rehearsal_on_a_cpu_gives_all_but_the_memory(command, results, cache, monkeypatch, capsys):
    monkeypatch.setattr(gpu_capture, "find_spec", lambda name: None)
    assert command(gpu_capture.measure, "--quick", "--device", "cpu", "--cache", str(cache)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() == {
        *(f"transformers_{name}" for name in ("overhead", "tokens_per_second", "bare_tokens_per_second")),
        *(f"sketch_{what}_{rows}" for what in ("over_log_softmax", "us_per_row") for rows in (128, 256, 1_024)),
    }
    assert all(value > 0 for value in figures.values())
    assert not results.exists()
