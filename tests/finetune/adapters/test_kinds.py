from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fakes.students import adapted
from fakes.targets import sequence
from softshard.config import AdapterKind, LoraSettings, OptimizerSettings, TrainSettings
from softshard.config.adapter import ADAPTER_HELP, DECODER_ADAPTERS
from softshard.data.batch import collate_text
from softshard.data.text import TextBatches
from softshard.errors import AdapterMissing, AdapterNotMergeable, ModelInvalid
from softshard.evaluate.labels import score_labels
from softshard.finetune.adapters.kinds import attach_adapter, load_adapter, merge_adapter, save_adapter
from softshard.finetune.adapters.lora import PLACEMENTS
from softshard.finetune.adapters.output import OUTPUT_ADAPTERS
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import fine_tune
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.finetune.retention import Retention
from softshard.models import load_model, load_tokenizer
from softshard.models.decoder import Decoder
from softshard.storage import LocalStore

KINDS = ["lora", "lora_and_lm_head", "lm_head", "post_norm", "correction"]
MERGED = [kind for kind in KINDS if kind != "correction"]
VOCAB = 300
IDS = torch.arange(40).reshape(2, 20)
SHAPE = LoraSettings(rank=4, alpha=8)
OPTIMIZER = OptimizerSettings(epochs=3, learning_rate=1e-2, batch_tokens=200, checkpoint_steps=2)
TEXT = [sequence("a", [3, 1, 4, 1, 5, 9, 2, 6], first_label=3), sequence("b", [2, 7, 1, 8, 2])]
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tiny_model, tmp_path_factory):
    """The tiny model with its output matrix tied to the embedding, and with one of its own."""
    if request.param == "tied":
        return tiny_model
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(5)
    model.lm_head.weight = nn.Parameter(torch.randn((320, 32), generator=generator) * 0.2)
    target = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(target)
    return target


def fresh(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device="cpu")


def disturbed(folder, kind, *, dtype=torch.float32):
    return adapted(folder, kind, SHAPE, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def written(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_a_trained_one_can_be_switched_off_and_taken_away(folder, kind):
    base = fresh(folder)
    before, embedding = logits(base), base.get_input_embeddings().weight.clone()
    assert torch.equal(logits(attach_adapter(base, kind, SHAPE, seed=0).eval()), before)
    model = disturbed(folder, kind)
    assert (logits(model) - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert (logits(model) - before).abs().max() > 1e-2, "it is in force again"
    inner = model.unload()
    assert torch.equal(logits(inner), before)
    assert torch.equal(inner.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(folder, kind):
    model, batch = disturbed(folder, kind), collate_text(TEXT)
    trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
    ours = CROSS_ENTROPY.loss(Decoder.of(model), batch, num_valid=VOCAB, chunk_positions=3)
    gradients = torch.autograd.grad(ours, list(trained.values()))
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(own[batch.positions, :VOCAB].double(), batch.labels)
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(loss, list(trained.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert other.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_retention_is_the_kl_to_the_model_without_its_adapter(folder, kind):
    model, batch = disturbed(folder, kind), collate_text(TEXT)
    retention = Retention(batches=TextBatches(TEXT, seed=0, batch_tokens=64, name="x"), weight=1.0, objective="kl")
    ours = retention.loss(model, Decoder.of(model), batch, num_valid=VOCAB, chunk_positions=3)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        own = model(**inputs).logits.flatten(0, 1)[batch.positions, :VOCAB].double().log_softmax(1)
        base = fresh(folder)(**inputs).logits.flatten(0, 1)[batch.positions, :VOCAB].double().log_softmax(1)
    expected = (base.exp() * (base - own)).sum(1).mean()
    assert expected > 1e-3
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
    torch.autograd.backward(ours)
    assert all(item.grad is not None for item in model.parameters() if item.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_with_the_same_bits_and_bytes(folder, kind, dtype, tmp_path):
    model = disturbed(folder, kind, dtype=dtype)
    files = save_adapter(model, base_model="tiny/model")
    again = load_adapter(fresh(folder, dtype), written(files, tmp_path / "adapter"), device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert save_adapter(again, base_model="tiny/model") == files
    assert not any(item.requires_grad for item in again.parameters())
    assert str(folder).encode() not in b"".join(files.values())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_models_own_logits(folder, kind):
    model = disturbed(folder, kind)
    ((_, scores),) = score_labels(model, [(TEXT[1], None)], num_valid=VOCAB, batch_tokens=64)
    ids = torch.from_numpy(TEXT[1].token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1, :VOCAB].double().log_softmax(1)
    expected = -logs.gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(scores.nll, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MERGED)
def test_merged_logits_are_the_adapters_and_the_embedding_stays(folder, kind):
    model = disturbed(folder, kind)
    adapted, embedding = logits(model), fresh(folder).get_input_embeddings().weight
    merged = merge_adapter(model)
    assert (logits(merged) - adapted).abs().max() < 1e-4
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings == tied
    assert tied == (kind == "lora" and fresh(folder).config.tie_word_embeddings)


def test_a_correction_head_is_not_merged(tiny_model):
    with pytest.raises(AdapterNotMergeable, match="correction: a correction head is not linear"):
        merge_adapter(disturbed(tiny_model, "correction"))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_a_stopped_one_ends_with_the_same_bytes(tiny_model, texts, kind, tmp_path):
    encoded = load_tokenizer(tiny_model).encode(texts)
    sequences = [sequence(f"text {number}", ids) for number, ids in enumerate(encoded)]

    def train(checkpoint, stop=None):
        def on_step(step):
            if step.step == stop:
                raise Stopped

        tuned = fine_tune(
            fresh(tiny_model),
            TextBatches(sequences, seed=0, batch_tokens=200, name="style"),
            lora=LoraSettings(rank=4, dropout=0.1),
            adapter=kind,
            optimizer=OPTIMIZER,
            retention=Retention(
                batches=TextBatches(sequences, seed=1, batch_tokens=100, name="other"), weight=0.1, objective="kl"
            ),
            seed=0,
            num_valid=VOCAB,
            chunk_positions=64,
            checkpoint=checkpoint,
            identity="tiny",
            on_step=on_step,
        )
        return tuned.log, save_adapter(tuned.model, base_model="tiny")

    log, whole = train(None)
    checkpoint = Checkpoint(store=LocalStore(tmp_path), path="checkpoint.pt")
    with pytest.raises(Stopped):
        train(checkpoint, stop=3)
    assert train(checkpoint) == (log, whole)
    first, last = (np.mean([step.loss for step in log if step.epoch == epoch]) for epoch in (0, 2))
    assert last < first


def test_lm_head_goes_with_the_last_layers(tiny_model):
    model = attach_adapter(fresh(tiny_model), "lora_and_lm_head", LoraSettings(rank=2, last_layers=1), seed=0)
    names = [name for name, item in model.named_parameters() if item.requires_grad]
    assert {"layers.1" in name or "lm_head" in name for name in names} == {True}
    assert sum("lm_head" in name for name in names) == 2
    assert len(names) == 2 * (7 + 1)


@pytest.mark.parametrize("kind", ["post_norm", "correction"])
def test_a_damaged_adapter_of_the_output_or_one_of_another_model_is_named(tiny_model, kind, tmp_path):
    files = save_adapter(disturbed(tiny_model, kind), base_model="tiny")
    weights, config = "output_adapter.safetensors", "output_adapter.json"
    for name, changed, message in (
        ("cut", {**files, weights: files[weights][:90]}, "cannot be loaded"),
        ("kind", {**files, config: files[config].replace(kind.encode(), b"other")}, "cannot be loaded"),
        ("rank", {**files, config: json.dumps({**json.loads(files[config]), "rank": 3}).encode()}, "another model"),
    ):
        with pytest.raises(ModelInvalid, match=message):
            load_adapter(fresh(tiny_model), written(changed, tmp_path / name), device="cpu")
    with pytest.raises(AdapterMissing, match=weights):
        load_adapter(fresh(tiny_model), written({config: files[config]}, tmp_path / "half"), device="cpu")


@pytest.mark.parametrize("shape", [{"last_layers": 1}, {"target_modules": ["q_proj"]}])
def test_layers_are_refused_where_none_is_adapted(shape):
    assert TrainSettings(adapter="lora_and_lm_head", lora=LoraSettings(**shape)).adapter == "lora_and_lm_head"
    with pytest.raises(ValidationError, match="adapts no layer of the decoder"):
        TrainSettings(adapter="post_norm", lora=LoraSettings(**shape))


def test_every_kind_has_one_implementation():
    assert sorted([*PLACEMENTS, *OUTPUT_ADAPTERS]) == sorted(get_args(AdapterKind)) == sorted(KINDS)
    assert sorted(ADAPTER_HELP) == sorted(KINDS)
    assert {kind for kind, placement in PLACEMENTS.items() if placement.decoder} == DECODER_ADAPTERS
