"""Packed batches: the same targets and the same hidden states as padded ones, in one row of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fakes.targets import VOCAB, metadata, numbered_parts, numbers_in, row, sequence, write_targets
from softshard.config import LoraSettings, OptimizerSettings
from softshard.data.batch import collate, collate_text
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mixing import Mixing
from softshard.data.shuffle import batch_bounds
from softshard.data.target_set import TargetSet
from softshard.data.text import TextBatches
from softshard.errors import ModelInvalid
from softshard.finetune.adapters.lora import attach_lora
from softshard.finetune.loop import fine_tune
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.integrations.causal_lm import accept_targets
from softshard.models.decoder import Decoder


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def body(request, tiny_model):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=request.param)
    return loaded.eval().get_decoder()


def rows(count=5):
    rng = np.random.default_rng(11)
    return [row(f"{n}", int(length), rng, first_label=1 + n % 3) for n, length in enumerate(rng.integers(4, 12, count))]


@torch.no_grad()
def test_hidden_states_of_packed_sequences_are_those_of_each_alone(body):
    sequences = [tokens for tokens, _ in rows()]
    batch = collate_text(sequences, packing=True)
    packed = body(**batch.model_inputs()).last_hidden_state.flatten(0, 1)[batch.positions]
    alone = [body(**collate_text([one]).model_inputs()).last_hidden_state[0] for one in sequences]
    expected = torch.cat([h[s.positions] for h, s in zip(alone, sequences, strict=True)])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_in_one_sequence_leaves_the_next_as_it_was(body):
    first, second = sequence("a", [5, 6, 7]), sequence("b", [8, 9, 10, 11])
    other = sequence("c", [30, 40, 20])
    states = [
        body(**collate_text([one, second], packing=True).model_inputs()).last_hidden_state[0, 3:]
        for one in (first, other)
    ]
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["threshold", "topk"])
def test_packed_and_padded_batches_hold_the_same_targets(kind):
    rng = np.random.default_rng(2)
    made = [row(f"{n}", length, rng, kind=kind) for n, length in enumerate((7, 4, 9))]
    settings = {"metadata": metadata(kind), "mixing": Mixing(alpha=0.3, truncated="ghost")}
    padded, packed = collate(made, **settings), collate(made, **settings, packing=True)
    for name in ("labels", "entry_ids", "entry_weights", "entry_offsets", "position_weights"):
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name
    assert packed.num_tokens == padded.num_tokens == 20
    assert torch.equal(packed.input_ids[0, packed.positions + 1], packed.labels)


def test_a_packed_row_worked_out_by_hand():
    batch = collate_text([sequence("a", [5, 6, 7]), sequence("b", [8, 9], first_label=1)], packing=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seq_lens.tolist() == [0, 3, 5]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.positions.tolist() == [0, 1, 3]
    assert batch.labels.tolist() == [6, 7, 9]
    assert (batch.max_length, batch.attention_mask) == (3, None)


def test_packed_batches_are_filled_by_the_sum_of_lengths_worked_out_by_hand():
    assert batch_bounds(np.array([3, 3, 4, 12, 1, 2]), batch_tokens=10, packing=True).tolist() == [0, 3, 4, 6]


def test_a_packed_epoch_has_each_sequence_once_within_the_budget(tmp_path):
    store, manifest = write_targets(tmp_path, numbered_parts(np.random.default_rng(0), (40, 9)))
    data = SoftLabelDataset(
        TargetSet(store=store, manifest=manifest),
        seed=0,
        batch_tokens=64,
        shuffle_buffer=8,
        alpha=0.5,
        packing=True,
        rank=0,
        world_size=1,
    )
    batches = list(data)
    assert sorted(number for batch in batches for number in numbers_in(batch)) == list(range(49))
    assert all(batch.input_ids.shape == (1, batch.num_tokens) for batch in batches)
    assert max(batch.num_tokens for batch in batches) <= 64
    assert np.mean([batch.num_tokens for batch in batches]) > 50


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2}
APART = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 16},
    "gpt_neox": {},
    "gpt2": {**GPT, "n_positions": 64},
    "gptj": {**GPT, "rotary_dim": 8},
}
MIXING = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"n_head": 2, "n_layer": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
    "mamba": {"state_size": 8},
    "lfm2": {"full_attn_idxs": [1], "block_multiple_of": 16},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
}
TOGETHER = [sequence("a", [5, 6, 7, 8, 9, 11, 3]), sequence("b", [8, 9, 10, 11, 13]), sequence("c", [30, 40, 20, 3])]


def architecture(name, dtype=torch.float32):
    settings = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **settings, **(APART | MIXING)[name]})
    return AutoModelForCausalLM.from_config(config).to(dtype)


def loss_of(model, batch):
    return CROSS_ENTROPY.loss(Decoder.of(model.eval()), batch, num_valid=VOCAB, chunk_positions=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
@torch.no_grad()
def test_a_model_that_keeps_sequences_apart_is_taken_and_has_the_loss_of_each_alone(name, dtype):
    model = architecture(name, dtype)
    alone = [float(loss_of(model, collate_text([one]))) for one in TOGETHER]
    expected = np.average(alone, weights=[one.num_labels for one in TOGETHER])
    packed = loss_of(model, collate_text(TOGETHER, packing=True))
    assert float(packed) == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_the_sequences_of_a_row_is_refused_packed_batches_and_takes_padded_ones(name, dtype):
    model = architecture(name, dtype)
    with torch.no_grad():
        loss_of(model, collate_text(TOGETHER))
        with pytest.raises(ModelInvalid, match="mixes the sequences"):
            loss_of(model, collate_text(TOGETHER, packing=True))
    accept_targets(model, vocab_size=VOCAB)
    model(**collate_text(TOGETHER).features())
    for _ in range(2):
        with pytest.raises(ModelInvalid, match="without packing"):
            model(**collate_text(TOGETHER, packing=True).features())


def test_the_train_stage_refuses_to_pack_for_a_model_that_mixes():
    batches = TextBatches(TOGETHER, seed=0, batch_tokens=64, name="text", packing=True)
    settings = {"retention": None, "seed": 0, "num_valid": VOCAB, "chunk_positions": 64, "checkpoint": None}
    steps = []
    with pytest.raises(ModelInvalid, match="mixes the sequences"):
        fine_tune(
            architecture("lfm2"),
            batches,
            lora=LoraSettings(rank=2),
            optimizer=OptimizerSettings(),
            identity="",
            on_step=steps.append,
            **settings,
        )
    assert steps == []


def test_trying_a_model_out_leaves_modes_and_random_numbers_as_they_were_and_is_done_once():
    model = attach_lora(architecture("llama"), LoraSettings(rank=2, dropout=0.5), seed=0)
    calls = []
    accept_targets(model, vocab_size=VOCAB)
    model.train()
    model.get_decoder().norm.eval()
    modes = [module.training for module in model.modules()]
    model.get_decoder().register_forward_hook(lambda module, *call: calls.append(module.training))
    batch = collate_text(TOGETHER, packing=True).features()
    torch.manual_seed(1)
    first = model(**batch).loss
    assert [module.training for module in model.modules()] == modes
    after = torch.get_rng_state()
    torch.manual_seed(1)
    model(**batch)
    assert calls == [False, False, True, True]
    assert torch.equal(torch.get_rng_state(), after)
    first.backward()
    assert all(item.grad is not None for name, item in model.named_parameters() if "lora_A" in name)
