from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from softshard.config import LoraSettings
from softshard.errors import AdapterMissing, ModelInvalid
from softshard.finetune.adapters.lora import PLACEMENTS, adapter_digest, attach_lora, load_adapter, save_adapter
from softshard.models import load_model

IDS = torch.arange(40).reshape(2, 20)
SMALL = LoraSettings(rank=4)


def fresh(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device="cpu")


def disturbed(model, seed=0):
    """The adapter as some training might leave it: its second factors are no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def written(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def adapted_modules(model):
    return {
        name.split(".lora_")[0].split("base_model.model.")[1]
        for name, item in model.named_parameters()
        if item.requires_grad
    }


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_all_linear_layers_but_the_output_are_adapted(tiny_model):
    model = attach_lora(fresh(tiny_model), SMALL, seed=0)
    linear = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    linear |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert adapted_modules(model) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in linear}


def multimodal():
    """A Gemma 3 of two layers with a vision tower of two."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 300, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299)
    )


@pytest.mark.parametrize("kind", ["lora", "lora_and_lm_head"])
@pytest.mark.parametrize(("last_layers", "layers"), [(None, {0, 1}), (1, {1})])
def test_of_a_model_that_sees_only_the_language_model_is_adapted(tmp_path, kind, last_layers, layers):
    lora = LoraSettings(rank=2, last_layers=last_layers)
    model = attach_lora(multimodal(), lora, seed=0, placement=PLACEMENTS[kind])
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = {f"model.language_model.layers.{layer}.{name}" for layer in layers for name in linear}
    assert adapted_modules(model) == expected | ({"lm_head"} if kind == "lora_and_lm_head" else set())
    again = load_adapter(
        multimodal(), written(save_adapter(model), tmp_path / "saved"), adapter_name="default", device="cpu"
    )
    assert {name for name, _ in again.named_modules() if name.endswith("lora_A")} == {
        name for name, _ in model.named_modules() if name.endswith("lora_A")
    }


def test_last_layers_adapts_only_those(tiny_model):
    model = attach_lora(fresh(tiny_model), LoraSettings(rank=4, last_layers=1), seed=0)
    assert {re.search(r"layers\.(\d+)", name).group(1) for name in adapted_modules(model)} == {"1"}


def test_named_modules_are_adapted_and_an_unknown_one_is_named(tiny_model):
    model = attach_lora(fresh(tiny_model), LoraSettings(target_modules=("q_proj",)), seed=0)
    assert adapted_modules(model) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    with pytest.raises(ModelInvalid, match=r"'query'.*q_proj"):
        attach_lora(fresh(tiny_model), LoraSettings(target_modules=("query",)), seed=0)


@pytest.mark.filterwarnings("error")
def test_conv1d_of_gpt2_counts_as_linear(tmp_path):
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).requires_grad_(False).eval()
    before = logits(base)
    model = disturbed(attach_lora(base, LoraSettings(rank=2, last_layers=1), seed=0))
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert adapted_modules(model) == {f"transformer.h.1.{name}" for name in names}
    after = logits(model)
    folder = written(save_adapter(model), tmp_path / "adapter")
    base = model.unload()
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(load_adapter(base, folder, adapter_name="again", device="cpu")), after)


def test_a_new_adapter_changes_nothing_and_unload_gives_the_base_back(tiny_model):
    base = fresh(tiny_model)
    before = logits(base)
    model = attach_lora(base, SMALL, seed=0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(disturbed(model)), before)
    assert torch.equal(logits(model.unload()), before)


def test_the_adapter_is_float32_on_a_bfloat16_base(tiny_model):
    model = attach_lora(fresh(tiny_model, torch.bfloat16), SMALL, seed=0)
    assert {item.dtype for item in model.parameters() if item.requires_grad} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_first_weights_hang_on_the_seed_alone(tiny_model):
    torch.manual_seed(1)
    one = save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=0)) == one
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=1)) != one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_adapter_gives_the_same_bits(tiny_model, tmp_path, dtype):
    model = disturbed(attach_lora(fresh(tiny_model, dtype), SMALL, seed=0))
    folder = written(save_adapter(model), tmp_path / "adapter")
    state = torch.get_rng_state()
    reloaded = load_adapter(fresh(tiny_model, dtype), folder, adapter_name="style", device="cpu")
    assert torch.equal(logits(reloaded), logits(model))
    assert not any(item.requires_grad for item in reloaded.parameters())
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert save_adapter(reloaded, adapter_name="style") == save_adapter(model)


def test_several_adapters_share_one_model(tiny_model, tmp_path):
    expected, model = [], fresh(tiny_model)
    for number in range(2):
        one = disturbed(attach_lora(fresh(tiny_model), SMALL, seed=number), seed=number)
        expected.append(logits(one))
        folder = written(save_adapter(one), tmp_path / str(number))
        model = load_adapter(model, folder, adapter_name=f"fold{number}", device="cpu")
    assert torch.equal(logits(model), expected[1])
    model.set_adapter("fold0")
    assert torch.equal(logits(model), expected[0])


def test_the_config_names_the_base_as_the_job_does_and_no_folder(tiny_model):
    files = save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=0), base_model="tiny/model")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny/model"
    assert str(tiny_model).encode() not in b"".join(files.values())
    left = save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=0))
    assert json.loads(left["adapter_config.json"])["base_model_name_or_path"] == str(tiny_model)


def test_the_digest_hangs_on_every_byte():
    files = {"a": b"1", "b": b"2"}
    assert adapter_digest(files) == adapter_digest(dict(reversed(files.items())))
    assert (
        len({adapter_digest(item) for item in (files, {"a": b"2", "b": b"1"}, {"a": b"1"}, {"a": b"1", "c": b"2"})})
        == 4
    )


def test_a_folder_without_an_adapter_is_named(tiny_model, tmp_path):
    with pytest.raises(AdapterMissing, match=str(tmp_path)):
        load_adapter(fresh(tiny_model), tmp_path, adapter_name="style", device="cpu")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_is_damaged_or_of_another_model_is_refused(tiny_model, tmp_path):
    files = save_adapter(attach_lora(fresh(tiny_model), SMALL, seed=0))
    cut = {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:200]}
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        load_adapter(fresh(tiny_model), written(cut, tmp_path / "cut"), adapter_name="style", device="cpu")
    last = save_adapter(attach_lora(fresh(tiny_model), LoraSettings(rank=4, last_layers=1), seed=0))
    mixed = {**files, "adapter_model.safetensors": last["adapter_model.safetensors"]}
    with pytest.raises(ModelInvalid, match="another model"):
        load_adapter(fresh(tiny_model), written(mixed, tmp_path / "mixed"), adapter_name="style", device="cpu")
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        load_adapter(GPT2LMHeadModel(config), written(files, tmp_path / "other"), adapter_name="style", device="cpu")
