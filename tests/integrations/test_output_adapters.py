"""Adapters of the output layer: the loss is that of the model's own logits, with gradients for all weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

from fakes.students import randomised, student
from fakes.targets import VOCAB, numbered_parts, write_targets
from fakes.trainers import SoftLabelTrainer, arguments, dense_mean, stream
from softshard.config import LoraSettings
from softshard.data.target_set import TargetSet
from softshard.errors import ModelInvalid
from softshard.finetune.adapters.kinds import attach_adapter
from softshard.integrations.causal_lm import accept_targets


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    parts = numbered_parts(np.random.default_rng(0), (20, 14))
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), parts)
    return TargetSet(store=store, manifest=manifest)


def two_adapters(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    wrapped.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"]))
    wrapped.base_model.set_adapter(["default", "other"])
    return wrapped


def resized(model):
    model.resize_token_embeddings(70, mean_resizing=False)
    return model


def own(kind):
    return lambda model: attach_adapter(model, kind, LoraSettings(rank=2), seed=0)


def of_peft(kind=LoraConfig, **settings):
    return lambda model: get_peft_model(model, kind(**settings))


RIGHT = {
    "lora on lm_head": of_peft(r=2, target_modules=["lm_head"]),
    "lora on lm_head and the decoder": of_peft(r=2, target_modules=["lm_head", "q_proj", "down_proj"]),
    "rslora": of_peft(r=4, lora_alpha=3, use_rslora=True, target_modules=["lm_head"]),
    "two adapters": two_adapters,
    "modules_to_save": of_peft(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "modules_to_save with the embedding": of_peft(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    "trainable tokens": of_peft(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "dora in the decoder": of_peft(r=2, use_dora=True, target_modules=["q_proj"]),
    "resized": resized,
    "lora_and_lm_head": own("lora_and_lm_head"),
    "lm_head": own("lm_head"),
    "post_norm": own("post_norm"),
    "correction": own("correction"),
}
TIED = ["lora on lm_head", "modules_to_save", "trainable tokens", "resized", "lora_and_lm_head", "post_norm"]
CASES = [(name, False) for name in RIGHT] + [(name, True) for name in TIED]


def gradients(model):
    found = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("name", "tied"), CASES, ids=[f"{name}{' tied' * tied}" for name, tied in CASES])
def test_loss_and_gradients_are_those_of_the_models_own_logits(targets, name, tied, order):
    features = next(iter(stream(targets))).features()
    model = student(tied=tied)
    if order == "before":
        accept_targets(model, vocab_size=VOCAB)
    model = randomised(RIGHT[name](model), 0.2).eval()
    if order == "after":
        accept_targets(model, vocab_size=VOCAB)
    expected = dense_mean(model, features)
    expected.backward()
    wanted = gradients(model)
    loss = model(**features).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    assert sum(item is not None and bool(item.any()) for item in wanted.values()) >= 1
    for weight, gradient in gradients(model).items():
        if wanted[weight] is None:
            assert gradient is None or not gradient.any(), weight
        else:
            distance = (gradient - wanted[weight]).norm() / wanted[weight].norm().clamp(min=1e-9)
            assert float(distance) < 1e-4, weight


def test_an_adapter_that_is_disabled_or_merged_is_seen(targets):
    features = next(iter(stream(targets))).features()
    model = randomised(get_peft_model(student(), LoraConfig(r=2, target_modules=["lm_head"])), 0.2).eval()
    accept_targets(model, vocab_size=VOCAB)
    active = model(**features).loss.detach()
    with model.disable_adapter(), torch.no_grad():
        without = model(**features).loss
        torch.testing.assert_close(without.double(), dense_mean(model, features), rtol=1e-6, atol=0)
    assert float(active) != pytest.approx(float(without), abs=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(**features).loss, active, rtol=1e-5, atol=0)


REFUSED = {
    "dora": (of_peft(r=2, use_dora=True, target_modules=["lm_head"]), "`use_dora`"),
    "bias": (of_peft(r=2, lora_bias=True, target_modules=["lm_head"]), "`lora_bias`"),
    "ia3": (
        of_peft(IA3Config, target_modules=["lm_head", "down_proj"], feedforward_modules=["down_proj"]),
        "of the kind ia3",
    ),
    "adalora": (of_peft(AdaLoraConfig, target_modules=["lm_head"], total_step=10), "of the kind adalora"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_has_no_such_form_is_refused_by_name(targets, name, order):
    attach, said = REFUSED[name]
    model = student()
    if order == "before":
        accept_targets(model, vocab_size=VOCAB)
        model = attach(model)
        with pytest.raises(ModelInvalid, match="take the output layer out of `target_modules`") as caught:
            model(**next(iter(stream(targets))).features())
    else:
        with pytest.raises(ModelInvalid, match="take the output layer out of `target_modules`") as caught:
            accept_targets(attach(model), vocab_size=VOCAB)
    assert said in str(caught.value)


def test_trainer_trains_a_lora_on_the_output_layer(targets, tmp_path):
    model = get_peft_model(student(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    trainer = SoftLabelTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=stream(targets), vocab_size=VOCAB)
    trainer.train()
    second = [item for name, item in model.named_parameters() if "lm_head" in name and "lora_B" in name]
    assert len(second) == 1
    assert second[0].any()
