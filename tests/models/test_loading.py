"""Model folders: what is missing or cut off is named before anything is made with them."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from softshard.errors import ModelInvalid
from softshard.models import check_weights, expert_share, load_empty_model, load_model, out_of_memory, weights_digest

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """The tiny model in several files."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="20KB")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    assert (folder / INDEX).is_file()
    return folder


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def refused(folder):
    """What is said of a folder, the same by all that read its weights."""
    said = set()
    for read in (check_weights, weights_digest, lambda path: load_model(path, dtype=torch.float32, device="cpu")):
        with pytest.raises(ModelInvalid) as caught:
            read(folder)
        said.add(str(caught.value))
    (message,) = said
    assert message.startswith(f"{folder}: ")
    return message


def test_whole_models_are_taken_in_one_file_or_many(tiny_model, sharded):
    assert [file.name for file in check_weights(tiny_model)] == ["model.safetensors"]
    assert check_weights(sharded) == shards(sharded)
    assert len(shards(sharded)) > 2
    one, many = (load_model(folder, dtype=torch.float32, device="cpu") for folder in (tiny_model, sharded))
    for (name, parameter), other in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_missing_shards_are_named_by_the_first(sharded):
    second, third = shards(sharded)[1:3]
    second.unlink()
    assert f"the shard {second.name}, which {INDEX} names, is missing (1 in all)" in refused(sharded)
    third.unlink()
    assert f"the shard {second.name}, which {INDEX} names, is missing (2 in all)" in refused(sharded)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_shard_that_is_cut_off_is_named(sharded, share):
    last = shards(sharded)[-1]
    content = last.read_bytes()
    last.write_bytes(content[: int(len(content) * share)])
    assert f"{last.name} is cut off" in refused(sharded)


def test_a_pointer_in_place_of_a_file_is_named(sharded):
    first = shards(sharded)[0]
    first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 20480\n")
    assert f"{first.name} is cut off or no safetensors file" in refused(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": []}}'])
def test_an_index_that_is_none_is_named(sharded, content):
    (sharded / INDEX).write_text(content)
    assert f"its {INDEX} cannot be read" in refused(sharded)


def test_a_folder_without_weights_says_so(tiny_model, tmp_path):
    shutil.copyfile(tiny_model / "config.json", tmp_path / "config.json")
    assert "has no weights (*.safetensors)" in refused(tmp_path)


def test_the_digest_is_of_config_and_all_weights(sharded, tmp_path):
    seen = {weights_digest(sharded)}
    for number, name in enumerate(["config.json", *(file.name for file in shards(sharded))]):
        copy = shutil.copytree(sharded, tmp_path / str(number))
        content = (copy / name).read_bytes()
        if name == "config.json":
            (copy / name).write_text(json.dumps({**json.loads(content), "use_cache": False}))
        else:
            (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(weights_digest(copy))
    assert len(seen) == len(shards(sharded)) + 2


@pytest.mark.parametrize("ask", [torch.empty, np.empty])
def test_memory_that_ran_out_is_told_from_other_failures(ask):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask(2**50)
    assert out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not out_of_memory(caught.value)


def test_share_of_the_experts_is_theirs_of_all_weights(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**shape, vocab_size=50, num_key_value_heads=1, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "moe")
    # Each of four experts in two layers has three matrices of 16 by 24.
    assert expert_share(load_empty_model(tmp_path / "moe")) == pytest.approx(
        2 * 4 * 3 * 16 * 24 / model.num_parameters()
    )


def test_most_models_have_no_experts(tiny_model):
    assert expert_share(load_empty_model(tiny_model)) == 0
