"""Cards and configurations that leave the machine: hub names, no paths, and a way to load what they describe."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM

from softshard.finetune.card import AdapterCard, card_files
from softshard.models import load_model
from softshard.output.workspace import Model


def header(card):
    return yaml.safe_load(card.split("---")[1])


@pytest.fixture
def chosen(finished):
    """Folder of the adapter."""
    return finished / "adapter" / json.loads((finished / "adapter/adapter.json").read_bytes())["adapter"]["folder"]


def test_no_path_of_the_machine_is_in_the_cards(finished, chosen, tiny_model):
    for file in (chosen / "README.md", chosen / "card.json", finished / "targets/README.md"):
        assert str(tiny_model.parents[1]) not in file.read_text(), file
    card = (chosen / "README.md").read_text()
    assert "base_model" not in header(card)
    assert f"of {tiny_model.name}, a local folder" in card


def test_the_adapter_is_loaded_by_peft_in_another_folder(chosen, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(chosen)
    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-4


def test_a_model_is_known_to_others_by_its_hub_name_or_its_folders_name(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    local = Model(name=tiny_model.name, folder=Path(tiny_model.name))
    assert (local.hub_name, local.title) == (None, tiny_model.name)
    assert local.location == os.fspath(tiny_model)
    hub = Model(name="people/letters-8b", folder=tmp_path / "snapshots/abc")
    assert (hub.hub_name, hub.title, hub.location) == ("people/letters-8b",) * 3


@pytest.mark.parametrize(
    ("kind", "library", "line"),
    [("lora", "peft", "from peft import"), ("post_norm", "softshard", "from softshard import load_adapter")],
)
def test_card_names_the_library_that_reads_the_adapter(chosen, kind, library, line):
    card = AdapterCard.model_validate_json((chosen / "card.json").read_bytes())
    settings = {**card.settings, "adapter": kind}
    card = card.model_copy(update={"settings": settings, "base_model": "people/letters", "base_model_on_hub": True})
    text = card_files(card)["README.md"].decode()
    assert header(text)["library_name"] == library
    assert header(text)["base_model"] == "people/letters"
    assert ("lora" in header(text)["tags"]) == (kind == "lora")
    assert line in text


def test_data_set_card_has_licence_size_and_a_way_in(finished):
    card = (finished / "targets/README.md").read_text()
    keys = header(card)
    assert keys["license"] == "cc0-1.0"
    assert keys["size_categories"] == ["n<1K"]
    assert [files["split"] for files in keys["configs"][0]["data_files"]] == ["train", "test"]
    assert "pl.read_parquet" in card
