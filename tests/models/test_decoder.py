"""Hidden states at the positions before labels, against a direct forward pass."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes.targets import sequence
from softshard.models.decoder import Decoder

SPANS = (((3, 5), (9, 12)), ((1, 8),), ((1, 2), (2, 4), (6, 7)))
LENGTHS = (14, 8, 7)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def masked():
    rng = np.random.default_rng(0)
    return [
        sequence(str(number), rng.integers(300, size=length), label_spans=spans)
        for number, (length, spans) in enumerate(zip(LENGTHS, SPANS, strict=True))
    ]


@torch.no_grad()
def test_states_are_those_before_the_labels_and_no_others(model, masked):
    expected = []
    for tokens in masked:
        hidden = model.model(torch.from_numpy(tokens.token_ids.astype(np.int64))[None]).last_hidden_state[0]
        expected += [hidden[label - 1] for start, stop in tokens.label_spans for label in range(start, stop)]
    states = Decoder.of(model).hidden_states(masked)
    assert len(states) == sum(tokens.num_labels for tokens in masked) == 16
    torch.testing.assert_close(states, torch.stack(expected), atol=1e-5, rtol=0)
