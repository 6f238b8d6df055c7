"""Models that a job cannot use: refused by `plan`, and by `run` before anything is computed, with one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from fakes.tiny import save_tiny_model
from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.output.workspace import open_workspace
from softshard.stages import STAGES
from softshard.stages.models import check_models


def edited(model, folder, **config):
    """A copy of a model with other values in its config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def of_another_kind(model, folder, config):
    """The tokenizer and weights of a model beside the config of another kind."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(model / name, folder / name)
    config.save_pretrained(folder)
    return folder


def encoder_decoder(model, folder):
    from transformers import T5Config

    config = T5Config(vocab_size=320, d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64)
    return of_another_kind(model, folder, config)


def encoder(model, folder):
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return of_another_kind(model, folder, config)


STUDENTS = {
    "another vocabulary": (
        lambda model, folder: save_tiny_model(folder, words=("zebra quartz",) * 50),
        {},
        "the tokenizer of",
    ),
    "fewer positions": (
        lambda model, folder: edited(model, folder, max_position_embeddings=16),
        {},
        "has 16 positions, `corpus.context_tokens` is 48",
    ),
    "fewer logits": (
        lambda model, folder: save_tiny_model(folder, vocab_size=290),
        {},
        "gives logits for 290 tokens",
    ),
    "an encoder and a decoder": (encoder_decoder, {}, "is of the kind 't5', which is no causal language model"),
    "an encoder": (encoder, {}, "is of the kind 'bert' and sees the tokens that it should predict"),
    "no layer of that name": (
        lambda model, folder: edited(model, folder),
        {"lora": {"target_modules": ["query_key_value"]}},
        "has no linear layer named 'query_key_value' to adapt",
    ),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_that_cannot_be_used_is_refused_before_anything_is_computed(
    name, command, tiny_job, tiny_model, tmp_path, capsys
):
    make, settings, said = STUDENTS[name]
    student = make(tiny_model, tmp_path / "student")
    job = tiny_job(tmp_path, train={"model": str(student), **settings})
    capsys.readouterr()
    assert main([command, str(job), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert str(student) in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("make", [encoder, encoder_decoder])
def test_a_teacher_of_another_kind_is_refused_before_anything_is_computed(make, tiny_job, tiny_model, tmp_path, capsys):
    teacher = make(tiny_model, tmp_path / "teacher")
    assert main(["run", str(tiny_job(tmp_path, teacher={"model": str(teacher)})), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{teacher}: is of the kind " in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("section", ["teacher", "train"])
def test_a_device_that_is_not_there_is_refused_at_once(section, command, tiny_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    job = tiny_job(tmp_path, cluster={}, **{section: {"device": "cuda:1"}})
    assert main([command, str(job), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{section}.device: cuda:1: torch sees 1 CUDA device(s) here" in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_at_once(tiny_job, tmp_path, capsys):
    assert main(["run", str(tiny_job(tmp_path, cluster={}, teacher={"device": "cuda"})), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "teacher.device: cuda: torch sees no CUDA device here; set `device: auto` or `device: cpu`" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_plan_measures_here_so_the_device_must_be_here(tiny_job, tmp_path, capsys):
    assert main(["plan", str(tiny_job(tmp_path, teacher={"device": "cuda"})), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "teacher.device: cuda: torch sees no CUDA device here" in line


def test_plan_refuses_a_retention_text_that_is_too_small_before_it_measures(tiny_job, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("The only one of its kind.")
    source = {
        "name": "r",
        "uri": str(tmp_path / "other.txt"),
        "style": "plain",
        "license": "MIT",
        "rights_basis": "owned",
    }
    assert main(["plan", str(tiny_job(tmp_path, train={"retention": {"sources": [source]}})), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "split of the text of train.retention has no documents (1 kept" in line


def test_the_device_of_a_teacher_on_other_machines_is_their_affair(tiny_job, tmp_path):
    """Only the workers of a scheduler that runs elsewhere know their devices; without tasks for them all goes well."""
    assert main(["corpus", str(tiny_job(tmp_path, teacher={"device": "cuda"})), "--quiet"]) == 0


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("section", ["teacher", "train"])
def test_a_quantised_model_without_its_package_is_refused_at_once(
    section, command, tiny_job, tiny_model, tmp_path, capsys
):
    quantised = edited(tiny_model, tmp_path / "quantised", quantization_config={"quant_method": "awq", "bits": 4})
    job = tiny_job(tmp_path, **{section: {"model": str(quantised)}})
    assert main([command, str(job), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"softshard: {section}.model: {quantised}: is quantised (awq) and needs a package")
    assert "gptqmodel" in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_engine_that_is_not_installed_is_refused_before_anything_is_computed(
    command, tiny_job, tmp_path, monkeypatch, capsys
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    assert main([command, str(tiny_job(tmp_path, teacher={"engine": "vllm"})), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "teacher.engine: vllm is not installed" in line
    assert not list((tmp_path / "out").glob("*"))


def test_experts_that_no_adapter_changes_are_said(tiny_job, tiny_model, tmp_path):
    folder = tmp_path / "experts"
    shutil.copytree(tiny_model, folder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**shape, vocab_size=320, num_key_value_heads=1, num_local_experts=4, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    job = load_job(tiny_job(tmp_path, teacher={"model": str(folder)}))
    (warning,) = check_models(open_workspace(job), STAGES)
    assert warning.startswith(f"{folder}: ")
    assert warning.endswith("% of its weights are experts, which no adapter changes")


def test_of_a_plain_model_nothing_is_said(tiny_job, tmp_path):
    assert check_models(open_workspace(load_job(tiny_job(tmp_path))), STAGES) == []
