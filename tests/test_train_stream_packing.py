"""Packed batches: the same targets and the same hidden states as padded ones, in one row of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from softshard.train.batch import collate, collate_text
from softshard.train.dataset import SoftLabelDataset
from softshard.train.order import batch_bounds
from softshard.train.reading import TargetSet
from tiny_targets import metadata, numbered_parts, numbers_in, row, sequence, write_targets


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
    expected = torch.cat([h[s.first_label - 1 : -1] for h, s in zip(alone, sequences, strict=True)])
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
    settings = {"metadata": metadata(kind), "alpha": 0.3, "truncated": "ghost"}
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
