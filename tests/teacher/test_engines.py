"""Which engine scores what, and what is said of one that is not there. Needs no vLLM."""

import errno
import importlib.util
import json

import pytest
import torch

from softshard.cli import main
from softshard.config import TeacherSettings, VllmSettings
from softshard.config.teacher import ENGINE_NAMES
from softshard.errors import EngineDiffers, EngineMissing
from softshard.teacher import engines, vllm_engine
from softshard.teacher.engines import find_engine, refuse_other_engine, run_teacher_identity, teacher_identity

VLLM = TeacherSettings(model="m", engine="vllm", device="cpu", vllm=VllmSettings(chunk_rows=64, kv_cache_gib=2))
OTHER = TeacherSettings(model="m", device="cpu")
NAMED = {"context_tokens": 512, "weights": "w"}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_version", lambda: "0.32.0")


@pytest.fixture
def missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_every_engine_that_a_job_can_name_is_one_module(name):
    engine = find_engine(name)
    assert isinstance(engine.AVERAGES_ADAPTERS, bool)
    assert all(callable(getattr(engine, given)) for given in ("process_identity", "engine_identity", "open_engine"))


def test_the_command_takes_the_engines_of_a_job_and_no_other(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path), "--against-teacher", "1", "--engine", "other"])
    assert "'other' is not an engine; choose from transformers, vllm" in capsys.readouterr().err


def test_every_setting_of_the_engine_is_in_its_identity(installed):
    identity = teacher_identity(VLLM, adapters=["a"], **NAMED)
    assert identity["engine"] == "vllm"
    assert identity["vllm"] == "0.32.0"
    assert identity["max_model_len"] == 512
    assert identity["enable_prefix_caching"] == 0
    settings = VLLM.vllm.model_dump()
    assert settings.keys() <= identity.keys()
    assert {name: identity[name] for name in settings} == settings
    assert json.loads(json.dumps(identity)) == identity
    assert not any(isinstance(value, bool) for value in identity.values())


def test_the_mean_of_several_adapters_is_the_transformers_engines(installed):
    assert teacher_identity(VLLM, adapters=["a"], **NAMED)["engine"] == "vllm"
    mean = teacher_identity(VLLM, adapters=["a", "b"], **NAMED)
    assert mean == teacher_identity(OTHER, adapters=["a", "b"], **NAMED)
    run = run_teacher_identity(VLLM, adapters=["a", "b"], **NAMED)
    assert run["engine"] == "vllm"
    assert run["adapters"] == ["a", "b"]
    assert run["holdout_engine"] == "transformers"
    assert run["holdout_batch_tokens"] == mean["batch_tokens"]
    assert "holdout_weights" not in run
    assert not any(name.startswith("holdout") for name in run_teacher_identity(VLLM, adapters=[], **NAMED))


def test_a_worker_with_another_version_refuses(installed, monkeypatch):
    identity = teacher_identity(VLLM, adapters=[], **NAMED)
    refuse_other_engine(identity, device="cpu")
    monkeypatch.setattr(vllm_engine, "_version", lambda: "0.33.0")
    with pytest.raises(EngineDiffers, match=r"vllm is 0\.33\.0, the job's is 0\.32\.0"):
        refuse_other_engine(identity, device="cpu")


def test_a_worker_without_the_engine_refuses(missing):
    with pytest.raises(EngineMissing, match=r"install softshard\[vllm\]"):
        refuse_other_engine({"engine": "vllm", "dtype": "float32"}, device="cpu")


def test_an_engine_that_is_not_installed_ends_the_command_with_one_line(missing, tiny_job, tmp_path, capsys):
    job = tiny_job(tmp_path, teacher={"engine": "vllm", "folds": 0})
    assert main(["corpus", str(job), "--quiet"]) == 0
    assert main(["teacher", str(job), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["targets", str(job), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "vllm is not installed; install softshard[vllm]" in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory, other processes hold it"),
        OSError(errno.EADDRINUSE, "Address already in use"),
    ],
)
def test_an_engine_that_opens_on_no_worker_ends_the_run_with_75_and_sets_no_part_aside(
    error, tiny_job, scheduler, tmp_path, monkeypatch, capsys
):
    def fail(*arguments, **options):
        raise error

    job = tiny_job(tmp_path, teacher={"folds": 0}, cluster={"scheduler": scheduler, "retry_seconds": 0})
    assert main(["corpus", str(job), "--quiet"]) == 0
    monkeypatch.setattr(engines, "open_teacher", fail)
    capsys.readouterr()
    assert main(["targets", str(job), "--quiet"]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "no worker is left that works: tcp://" in line
    assert str(error) in line
    monkeypatch.undo()
    assert main(["targets", str(job), "--quiet"]) == 0
