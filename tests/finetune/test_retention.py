from __future__ import annotations

import pytest
import torch

from fakes.targets import sequence
from softshard.config import LoraSettings
from softshard.data.batch import collate_text
from softshard.data.text import TextBatches
from softshard.finetune.adapters.lora import attach_lora
from softshard.finetune.retention import Retention
from softshard.models import load_model
from softshard.models.decoder import Decoder

TEXT = [sequence("a", [3, 1, 4, 1, 5, 9, 2, 6]), sequence("b", [2, 7, 1, 8, 2]), sequence("c", [6, 2])]
SIZES = {"num_valid": 300, "chunk_positions": 4}


def retention(objective):
    return Retention(
        batches=TextBatches(TEXT, seed=0, batch_tokens=64, name="retention"), weight=0.5, objective=objective
    )


@pytest.fixture
def adapted(tiny_model):
    model = attach_lora(load_model(tiny_model, dtype=torch.float32, device="cpu"), LoraSettings(rank=4), seed=0)
    with torch.no_grad():
        for name, item in model.named_parameters():
            if "lora_B" in name:
                item.copy_(torch.linspace(-0.2, 0.3, item.numel()).reshape(item.shape))
    return model


def test_kl_is_that_of_the_base_models_whole_distribution(adapted, tiny_model):
    batch = collate_text(TEXT)
    loss = retention("kl").loss(adapted, Decoder.of(adapted), batch, **SIZES)
    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logs = [
            torch.log_softmax(
                model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions, :300].double(), dim=1
            )
            for model in (base, adapted)
        ]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=1).mean()
    assert expected > 0.01
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_kl_pulls_the_adapter_back_and_leaves_it_switched_on(adapted):
    decoder, batch = Decoder.of(adapted), collate_text(TEXT)
    weights = [item for item in adapted.parameters() if item.requires_grad]
    losses = []
    for _ in range(3):
        loss = retention("kl").loss(adapted, decoder, batch, **SIZES)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for item, gradient in zip(weights, gradients, strict=True):
                item.sub_(0.001 * gradient)
    assert losses[2] < losses[1] < losses[0]


def test_an_adapter_that_changes_nothing_loses_nothing(tiny_model):
    model = attach_lora(load_model(tiny_model, dtype=torch.float32, device="cpu"), LoraSettings(rank=4), seed=0)
    assert retention("kl").loss(model, Decoder.of(model), collate_text(TEXT), **SIZES).item() == 0


def test_ce_is_the_models_own_cross_entropy(adapted):
    batch = collate_text(TEXT)
    loss = retention("ce").loss(adapted, Decoder.of(adapted), batch, num_valid=320, chunk_positions=4)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        expected = adapted(input_ids=batch.input_ids, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
