"""What vLLM serves of a student's adapter as it is, and that what is merged serves the same."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from fakes.students import adapted
from fakes.tiny_decoders import VOCAB, save_decoder
from softshard.config import LoraSettings
from softshard.finetune.adapters.kinds import merge_adapter, save_adapter
from softshard.models import load_model

IDS = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, 24)]
SHAPE = LoraSettings(rank=8, alpha=16)
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def by_transformers(model):
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([IDS])).logits[0, :-1].double().log_softmax(1)
    return logs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


def by_vllm(folder, adapter=None):
    engine = LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=2**26,
        skip_tokenizer_init=True,
        enable_lora=adapter is not None,
        max_lora_rank=8,
    )
    request = None if adapter is None else LoRARequest("student", 1, str(adapter))
    (output,) = engine.generate(
        [{"prompt_token_ids": IDS}],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        lora_request=request,
        use_tqdm=False,
    )
    found = [each[token].logprob for each, token in zip(output.prompt_logprobs[1:], IDS[1:], strict=True)]
    engine.llm_engine.engine_core.shutdown()
    return np.array(found)


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def base(request, tmp_path_factory):
    """A model with an output matrix of its own (Llama here), and one whose matrix is the embedding's (Qwen2 here)."""
    return save_decoder(tmp_path_factory.mktemp("base") / request.param, request.param)


def served_and_expected(base, kind, folder):
    model = adapted(base, kind, SHAPE)
    expected = by_transformers(model)
    folder.mkdir()
    for name, content in save_adapter(model, base_model="tiny").items():
        (folder / name).write_bytes(content)
    return by_vllm(base, folder), expected, by_transformers(load_model(base, dtype=torch.float32, device="cpu"))


def test_a_lora_of_the_decoder_is_served_as_it_is(base, tmp_path):
    served, expected, before = served_and_expected(base, "lora", tmp_path / "adapter")
    np.testing.assert_allclose(served, expected, atol=1e-3)
    assert np.abs(expected - before).max() > 0.05


@pytest.mark.parametrize("kind", ["lora_and_lm_head", "post_norm"])
def test_a_merged_adapter_of_the_output_is_served_as_a_model(base, kind, tmp_path):
    model = adapted(base, kind, SHAPE)
    expected = by_transformers(model)
    merge_adapter(model).save_pretrained(tmp_path / "model")
    for file in base.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "model" / file.name)
    np.testing.assert_allclose(by_vllm(tmp_path / "model"), expected, atol=1e-3)
    before = by_transformers(load_model(base, dtype=torch.float32, device="cpu"))
    assert np.abs(expected - before).max() > 0.05


@pytest.mark.parametrize("base", ["Llama"], indirect=True)
def test_a_lora_of_an_output_layer_with_a_matrix_of_its_own_is_served_as_it_is(base, tmp_path):
    served, expected, before = served_and_expected(base, "lm_head", tmp_path / "adapter")
    np.testing.assert_allclose(served, expected, atol=1e-3)
    assert np.abs(expected - before).max() > 0.05
