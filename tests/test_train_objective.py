from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from softshard.config import LoraSettings
from softshard.decoder import Decoder
from softshard.errors import ModelInvalid
from softshard.models import load_model
from softshard.train.batch import collate_text
from softshard.train.lora import attach_lora
from softshard.train.objective import hidden_states
from tiny_targets import sequence

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TEXT = [sequence("a", [3, 1, 4, 1, 5, 9, 2, 6], first_label=3), sequence("b", [2, 7, 1, 8, 2]), sequence("c", [6, 2])]


def test_hidden_states_at_the_positions_give_the_models_own_logits_label_by_label(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    decoder, batch = Decoder.of(model), collate_text(TEXT)
    ours = hidden_states(decoder, batch) @ decoder.weight.T
    alone = []
    for tokens in TEXT:
        logits = model(input_ids=torch.tensor([tokens.token_ids.tolist()])).logits[0]
        alone.append(logits[tokens.first_label - 1 : -1])
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_decoder_of_an_adapted_model_is_that_of_its_base(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    before = Decoder.of(model)
    after = Decoder.of(attach_lora(model, LoraSettings(rank=2), seed=0))
    assert before.body is after.body
    assert before.weight is after.weight


def test_gpt2_has_its_last_norm_in_the_body():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()
    decoder, batch = Decoder.of(model), collate_text(TEXT)
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(hidden_states(decoder, batch) @ decoder.weight.T, logits)


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=30.0)),
            "final_logit_softcapping to 30",
        ),
        (lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)), "logits_scaling to 8"),
        (lambda: CohereForCausalLM(CohereConfig(**{**SHAPE, "logit_scale": 0.0625})), "logit_scale to 0.0625"),
    ],
)
def test_a_model_that_caps_or_scales_its_logits_is_refused_by_name(build, setting):
    with pytest.raises(ModelInvalid, match=setting):
        Decoder.of(build())


def test_a_granite_that_scales_by_one_is_taken():
    model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=1.0)).eval()
    assert Decoder.of(model).weight.shape == (60, 16)


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_that_changes_its_logits_without_saying_so_is_refused(tiny_model):
    with pytest.raises(ModelInvalid, match="its logits are not"):
        Decoder.of(Doubled.from_pretrained(tiny_model))


def test_a_bfloat16_body_with_an_adapter_is_near_its_float32_twin(tiny_model):
    batch, states = collate_text(TEXT), []
    for dtype in (torch.float32, torch.bfloat16):
        model = attach_lora(load_model(tiny_model, dtype=dtype, device="cpu"), LoraSettings(rank=4), seed=0)
        with torch.no_grad():
            for name, item in model.named_parameters():
                if "lora_B" in name:
                    item.copy_(torch.linspace(-0.1, 0.1, item.numel()).reshape(item.shape))
        states.append(hidden_states(Decoder.of(model), batch))
    assert states[1].dtype == torch.bfloat16
    error = (states[0] - states[1].float()).norm() / states[0].norm()
    assert error < 0.05
