from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.finetune.adapters.kinds import load_adapter
from softshard.models import load_model
from softshard.records.digest import sha256_hex
from softshard.stages.export import export_model
from softshard.stages.job import run_job
from softshard.teacher.merged import CANARY_TEXT
from softshard.telemetry import SilentReporter

IDS = torch.arange(40)[None]
SMALL = {"baseline": None, "lora": {"rank": 4}}
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module", params=["lora", "lora_and_lm_head", "post_norm", "correction"])
def done(request, tiny_job, tmp_path_factory):
    """Kind and output of a whole run, its report included."""
    folder = tmp_path_factory.mktemp(request.param)
    job = load_job(tiny_job(folder, train={**SMALL, "adapter": request.param}))
    run_job(job, SilentReporter())
    return request.param, folder / "out"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapter_folder(out):
    return out / "adapter" / json.loads((out / "adapter" / "adapter.json").read_bytes())["adapter"]["folder"]


def test_an_exported_model_is_the_base_with_its_adapter(done, tiny_model, tmp_path, capsys):
    kind, out = done
    report = json.loads((out / "report" / "metrics.json").read_bytes())
    assert report["adapter"]["human_nll_nats"] != report["base"]["human_nll_nats"]
    code = main(["export", str(out), "--to", str(tmp_path / "model"), "--json"])
    printed = capsys.readouterr()
    if kind == "correction":
        assert code == 3
        assert "not linear" in printed.err
        assert printed.err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
        return
    said = json.loads(printed.out)
    assert code == 0
    assert said["canary_kl_nats"] > 0
    assert said["merge_difference"] <= 1e-4
    assert said["rounding_kl_nats"] < 1e-6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    before = logits(base)
    adapted = logits(load_adapter(base, adapter_folder(out), device="cpu"))
    assert (logits(model) - adapted).abs().max() < 1e-4
    assert (adapted - before).abs().max() > 1e-3
    assert model.config.tie_word_embeddings == (kind == "lora")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "lora")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode("The dog") == AutoTokenizer.from_pretrained(
        tiny_model
    ).encode("The dog")
    card = (tmp_path / "model" / "README.md").read_text()
    receipt = json.loads((out / "adapter" / "adapter.json").read_bytes())["adapter"]
    for named in (tiny_model.name, said["adapter"], *receipt["manifests"], "CC0-1.0, owned"):
        assert named in card
    assert str(tiny_model) not in card
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def halved(out, tiny_model, folder):
    """Folder of the model in bfloat16, of which the output's job is now."""
    half = folder / "half"
    load_model(tiny_model, dtype=torch.bfloat16, device="cpu").save_pretrained(half)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, half / file.name)
    job = (out / "job.yaml").read_text()
    (out / "job.yaml").write_text(job.replace(str(tiny_model), str(half)))
    return half


def test_the_weights_are_of_the_bases_type_unless_float32_is_asked_for(finished, tiny_model, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    halved(out, tiny_model, tmp_path)
    for choice, expected in (("base", torch.bfloat16), ("float32", torch.float32)):
        export_model(str(out), tmp_path / choice, dtype=choice)
        kinds = {item.dtype for item in load_file(tmp_path / choice / "model.safetensors").values()}
        assert kinds == {expected}


def test_two_exports_are_the_same_bytes(finished, tmp_path):
    for name in ("one", "two"):
        export_model(str(finished), tmp_path / name)
    files = [{path.name: sha256_hex(path.read_bytes()) for path in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_already_is_left_alone(finished, tmp_path, what, capsys):
    target = tmp_path / "model"
    mine = target if what == "file" else target / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert main(["export", str(finished), "--to", str(target)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_empty_folder_may_be_there_and_a_place_that_cannot_be_written_is_named(finished, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert main(["export", str(finished), "--to", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").is_file()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["export", str(finished), "--to", str(tmp_path / "file" / "model")]) == 2
    assert "`--to`" in capsys.readouterr().err


def test_an_output_without_a_trained_adapter_is_named(finished, tmp_path, capsys):
    shutil.copyfile(finished / "job.yaml", tmp_path / "job.yaml")
    assert main(["export", str(tmp_path), "--to", str(tmp_path / "model")]) == 3
    assert "adapter.json" in capsys.readouterr().err


def changed(finished: Path, folder: Path, factor: float) -> Path:
    """A copy of an output whose adapter's second factors are times a factor, with a receipt that says so."""
    out = shutil.copytree(finished, folder / "out")
    file = adapter_folder(out) / "adapter_model.safetensors"
    tensors = {name: item * (factor if "lora_B" in name else 1) for name, item in load_file(file).items()}
    before = sha256_hex(file.read_bytes())
    file.write_bytes(save(tensors, metadata={"format": "pt"}))
    pointer = out / "adapter" / "adapter.json"
    pointer.write_text(pointer.read_text().replace(before, sha256_hex(file.read_bytes())))
    return out


def test_an_adapter_that_changes_nothing_is_not_exported(finished, tmp_path, capsys):
    out = changed(finished, tmp_path, 0.0)
    assert main(["export", str(out), "--to", str(tmp_path / "model")]) == 3
    assert "the adapter changes nothing" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_what_rounding_leaves_of_an_adapter_is_said(finished, tiny_model, tmp_path):
    half = halved(out := changed(finished, tmp_path, 1.0), tiny_model, tmp_path)
    said = export_model(str(out), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer.encode(CANARY_TEXT)[:64]])

    def distribution(model):
        with torch.no_grad():
            return model(input_ids=ids).logits[0, :, : len(tokenizer)].double().log_softmax(1)

    base = load_model(half, dtype=torch.float32, device="cpu")
    before = distribution(base)
    adapted = distribution(load_adapter(base, adapter_folder(out), device="cpu"))
    written = distribution(load_model(tmp_path / "model", dtype=torch.float32, device="cpu"))
    mean = {"reduction": "batchmean", "log_target": True}
    assert said.canary_kl_nats == pytest.approx(float(kl_div(written, before, **mean)), rel=1e-3)
    assert said.rounding_kl_nats == pytest.approx(float(kl_div(written, adapted, **mean)), rel=1e-3)
    assert 0 < said.rounding_kl_nats < said.canary_kl_nats


def test_an_adapter_that_is_lost_in_rounding_is_not_exported_but_in_float32(finished, tiny_model, tmp_path, capsys):
    out = changed(finished, tmp_path, 1e-3)
    halved(out, tiny_model, tmp_path)
    assert main(["export", str(out), "--to", str(tmp_path / "model")]) == 3
    assert "rounded to bfloat16, the merged model is closer to the base" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["export", str(out), "--to", str(tmp_path / "model"), "--dtype", "float32"]) == 0


def test_a_merge_that_does_not_give_the_adapters_logits_is_not_exported(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("softshard.stages.export.merge_adapter", lambda model: model.unload())
    assert main(["export", str(finished), "--to", str(tmp_path / "model")]) == 3
    assert "a logit differs by" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_damaged_adapter_is_not_exported(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    file = adapter_folder(out) / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    assert main(["export", str(out), "--to", str(tmp_path / "model")]) == 3
    assert "is not the file" in capsys.readouterr().err


def test_what_a_processor_and_other_templates_need_is_copied(finished, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "base")
    extra = ("preprocessor_config.json", "processor_config.json", "additional_chat_templates/tools.jinja")
    for name in extra:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    out = shutil.copytree(finished, tmp_path / "out")
    job = yaml.safe_load((out / "job.yaml").read_text())
    job["teacher"]["model"] = str(model)
    (out / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["export", str(out), "--to", str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    assert [name for name in extra if not (tmp_path / "exported" / name).is_file()] == []
