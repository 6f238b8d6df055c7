"""What would train on something else in silence, and what is done instead: refused, or taken for what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast, TrainingArguments
from trl import SFTConfig

from fakes.students import student
from fakes.targets import VOCAB, numbered_parts, write_targets
from fakes.trainers import WEIGHTS, SoftLabelSFT, SoftLabelTrainer, arguments, dense_mean, stream, trained
from softshard.data.mix import MixWeights, SoftLabelMix
from softshard.data.target_set import TargetSet
from softshard.errors import ModelInvalid, ResumeMismatch, TokenizerMismatch
from softshard.finetune.objective import Objective
from softshard.integrations.causal_lm import accept_targets
from softshard.integrations.rows import SoftLabelCollator, target_rows
from softshard.models import load_tokenizer


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    parts = numbered_parts(np.random.default_rng(0), (20, 14))
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), parts)
    return TargetSet(store=store, manifest=manifest)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    parts = numbered_parts(np.random.default_rng(0), (4,), kind="topk")
    store, manifest = write_targets(tmp_path_factory.mktemp("heads"), parts, kind="topk")
    return TargetSet(store=store, manifest=manifest)


def trainer_of(targets, folder, *, kind=SoftLabelTrainer, data=None, **changes):
    own = {name: changes.pop(name) for name in list(changes) if name in OF_TRAINER}
    settings = arguments(folder, SFTConfig if kind is SoftLabelSFT else TrainingArguments, **changes)
    own = {"model": student(), "train_dataset": stream(targets) if data is None else data, "vocab_size": VOCAB, **own}
    return kind(args=settings, **own)


OF_TRAINER = (
    "objective",
    "compute_loss_func",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "processing_class",
    "eval_dataset",
    "data_collator",
    "model",
)
UNPREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def test_a_model_of_model_init_is_trained_on_the_targets_as_one_that_is_given(targets, tmp_path):
    given = trainer_of(targets, tmp_path, max_steps=2)
    given.train()
    made = SoftLabelTrainer(
        model_init=lambda: student(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=stream(targets),
        vocab_size=VOCAB,
    )
    made.train()
    assert torch.equal(trained(made.model), trained(given.model))


def columns(targets, number, **changes):
    """One row as a data set would give it that holds rows of other kinds too: columns it has not are None."""
    names = ("tail_mass", "position_weights", "counted")
    return {**dict.fromkeys(names), **list(target_rows(targets, **{"alpha": 0.5, **changes}))[number]}


def test_rows_that_differ_in_alpha_and_weights_have_in_one_batch_the_loss_that_they_have_alone(targets, heads):
    cases = {
        "alpha": [columns(heads, 0), columns(heads, 1, alpha=0.0)],
        "weights": [columns(targets, 0, weights=WEIGHTS), columns(targets, 1)],
        "kind": [columns(targets, 0), columns(heads, 1, truncated="renormalise"), columns(heads, 2, alpha=1.0)],
        "groups": [{**columns(targets, 0, weights=WEIGHTS), "counted": None}, columns(targets, 1)],
    }
    first = cases["groups"][1]
    first["counted"] = np.full(len(first["entry_counts"]), 0.25, dtype=np.float32)
    model, collator = student(), SoftLabelCollator()
    accept_targets(model, vocab_size=VOCAB)
    for what, rows in cases.items():
        apart = [collator([row]) for row in rows]
        weight = sum(float(one.get("counted", one["position_weights"]).sum()) for one in apart)
        expected = sum(model(**one, num_items_in_batch=weight).loss.item() for one in apart)
        for order in (rows, rows[::-1]):
            assert float(model(**collator(order)).loss) == pytest.approx(expected, rel=1e-6), what


def test_rows_with_a_ghost_token_are_not_batched_with_rows_that_have_none(targets, heads):
    for rows in ([columns(heads, 0), columns(targets, 0)], [columns(targets, 0), columns(heads, 0)]):
        with pytest.raises(ValueError, match="ghost token"):
            SoftLabelCollator()(rows)


@pytest.mark.parametrize("prompt", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_before_the_text_are_refused_whichever_comes_first(targets, prompt):
    settings = prompt(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ModelInvalid, match="virtual tokens"):
        accept_targets(get_peft_model(student(), settings), vocab_size=VOCAB)
    inner = student()
    accept_targets(inner, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="embeddings"):
        get_peft_model(inner, settings)(**next(iter(stream(targets))).features())


def test_a_prefix_is_taken_for_padded_batches_and_refused_for_packed_ones(targets):
    torch.manual_seed(1)
    model = get_peft_model(student(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    features = next(iter(stream(targets))).features()
    with torch.no_grad():
        expected = float(dense_mean(lambda use_cache, **inputs: model(**inputs), features))
    accept_targets(model, vocab_size=VOCAB)
    assert float(model(**features).loss) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ModelInvalid, match="prefix"):
        model(**next(iter(stream(targets, packing=True))).features())


def test_a_model_whose_own_loss_on_routers_would_be_left_out_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0, "vocab_size": 60}
    for asked in (True, False):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**shape, output_router_logits=asked))
        if asked:
            with pytest.raises(ModelInvalid, match="output_router_logits=False"):
                accept_targets(model, vocab_size=VOCAB)
        else:
            accept_targets(model, vocab_size=VOCAB)


def test_a_model_takes_targets_once_and_with_one_objective(targets):
    features = next(iter(stream(targets))).features()
    model = get_peft_model(student(), LoraConfig(target_modules="all-linear"))
    accept_targets(model, vocab_size=VOCAB, objective=Objective(temperature=2.0))
    loss = model(**features).loss
    accept_targets(model, vocab_size=VOCAB, objective=Objective(temperature=2.0))
    with pytest.raises(ValueError, match="already"):
        accept_targets(model, vocab_size=VOCAB)
    assert torch.equal(model(**features).loss, loss)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"kind": SoftLabelSFT, "loss_type": "dft", "dataset_kwargs": {"skip_prepare_dataset": True}}, "loss_type"),
        ({"compute_loss_func": lambda *given, **more: None}, "compute_loss_func"),
        ({"compute_metrics": lambda found: {}}, "compute_metrics"),
        ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "preprocess_logits_for_metrics"),
        ({"kind": SoftLabelSFT, "completion_only_loss": True, **UNPREPARED}, "completion_only_loss"),
        ({"kind": SoftLabelSFT, "max_length": 5, **UNPREPARED}, "max_length=5"),
        ({"save_strategy": "epoch"}, "save_strategy"),
        ({"logging_strategy": "epoch"}, "logging_strategy"),
        ({"objective": Objective(temperature=4.0)}, "temperature"),
    ],
)
def test_what_would_have_another_effect_than_it_says_is_refused(targets, tiny_model, tmp_path, changes, named):
    if changes.get("kind") is SoftLabelSFT:
        rows = Dataset.from_list(list(target_rows(targets, alpha=0.5)))
        changes = {**changes, "data": rows, "data_collator": SoftLabelCollator()}
        changes["processing_class"] = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=named):
        trainer_of(targets, tmp_path, **changes)


def test_evaluation_after_each_epoch_of_a_stream_is_refused(targets, tmp_path):
    changes = {"eval_dataset": list(target_rows(targets, alpha=0.5)), "data_collator": SoftLabelCollator()}
    with pytest.raises(ValueError, match="eval_strategy"):
        trainer_of(targets, tmp_path, eval_strategy="epoch", **changes)


def test_the_tokenizer_and_the_temperature_must_be_those_of_the_stream(targets, tiny_model, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    mix = SoftLabelMix([stream(targets)], MixWeights(points=((0, (1.0,)),)), rank=0, world_size=1)
    for data in (stream(targets), mix):
        with pytest.raises(TokenizerMismatch):
            trainer_of(targets, tmp_path, data=data, processing_class=tokenizer)
    parts, own = numbered_parts(np.random.default_rng(0), (6,)), load_tokenizer(tiny_model).fingerprint
    store, manifest = write_targets(tmp_path / "own", parts, tokenizer=own)
    same = stream(TargetSet(store=store, manifest=manifest))
    trainer_of(targets, tmp_path, data=same, processing_class=tokenizer)
    softened = stream(targets, alpha=0.0)
    softened.temperature = 4.0
    trainer_of(targets, tmp_path, data=softened, objective=Objective(temperature=4.0))


@pytest.mark.parametrize("changes", [{"alpha": 0.9}, {"weights": None}])
def test_a_checkpoint_of_the_same_order_with_other_targets_is_refused(targets, tmp_path, changes):
    trainer_of(targets, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer_of(targets, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ResumeMismatch, match="content"):
        trainer_of(targets, tmp_path, data=stream(targets, **changes), max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_evaluation_is_the_mean_over_labels_by_weights_whatever_the_batches(targets, tmp_path, packing):
    rows = list(target_rows(targets, alpha=0.5, weights=WEIGHTS))
    with torch.no_grad():
        expected = float(dense_mean(student().eval(), SoftLabelCollator()(rows)))
    collator = SoftLabelCollator(packing=packing)
    for size in (1, 8, 34):
        trainer = trainer_of(targets, tmp_path, data_collator=collator, per_device_eval_batch_size=size)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5), size
        assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-5), size
