"""A model that takes targets: in a plain loop, Trainer and SFTTrainer; rows as columns, and in axolotl's layout."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fakes.students import student
from fakes.targets import VOCAB, numbered_parts, row, sequence, write_targets
from fakes.trainers import (
    WEIGHTS,
    SoftLabelSFT,
    SoftLabelTrainer,
    adapted,
    arguments,
    dense_mean,
    stream,
    trained,
)
from softshard.config import LoraSettings
from softshard.data.batch import collate_text
from softshard.data.target_set import TargetSet
from softshard.errors import ResumeMismatch, VocabularyMismatch
from softshard.finetune.adapters.lora import attach_lora
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.integrations.axolotl import axolotl_rows
from softshard.integrations.causal_lm import accept_targets, weight_of_step
from softshard.integrations.rows import SoftLabelCollator, target_rows
from softshard.models.decoder import Decoder


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    parts = numbered_parts(np.random.default_rng(0), (20, 14))
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), parts)
    return TargetSet(store=store, manifest=manifest)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Top-k targets; the first label of some rows is not their second token."""
    rng = np.random.default_rng(1)
    parts = [[row(f"{n:032d}", 7 + n % 3, rng, kind="topk", first_label=1 + n % 4) for n in range(6)]]
    store, manifest = write_targets(tmp_path_factory.mktemp("heads"), parts, kind="topk")
    return TargetSet(store=store, manifest=manifest)


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_that_takes_targets_gives_their_loss_and_its_gradients(targets, packing):
    batch = next(iter(stream(targets, packing=packing)))
    reference, model = adapted(), adapted()
    accept_targets(model, vocab_size=VOCAB)
    expected, loss = dense_mean(reference, batch.features()), model(**batch.features()).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    expected.backward()
    loss.backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_without_targets_a_model_is_called_as_before_and_keeps_its_modes():
    plain, model = adapted(), adapted()
    model.train()
    model.get_decoder().eval()
    modes = [module.training for module in model.modules()]
    accept_targets(model, vocab_size=VOCAB)
    assert [module.training for module in model.modules()] == modes
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        one, other = model(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(model.eval().generate(ids, max_new_tokens=3), plain.eval().generate(ids, max_new_tokens=3))


def test_a_copy_of_a_model_that_takes_targets_has_weights_of_its_own(targets):
    features = next(iter(stream(targets))).features()
    model = student()
    accept_targets(model, vocab_size=VOCAB)
    twin, before = copy.deepcopy(model), model(**features).loss.detach()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.get_decoder().norm.weight.mul_(2)
    assert torch.equal(twin(**features).loss, before)
    assert not torch.equal(model(**features).loss, before)


def test_a_half_precision_base_with_an_adapter_gives_the_loss_of_the_train_stage(targets):
    batch = next(iter(stream(targets)))
    model = attach_lora(student(dtype=torch.bfloat16), LoraSettings(rank=2), seed=0)
    expected = CROSS_ENTROPY.loss(Decoder.of(model.eval()), batch, num_valid=VOCAB, chunk_positions=512)
    accept_targets(model, vocab_size=VOCAB)
    assert torch.equal(model(**batch.features()).loss, expected)


class LargestShare(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    size = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        self.size = max([self.size, *(item.numel() for item in tree_leaves(result) if isinstance(item, torch.Tensor))])
        return result


def test_no_tensor_of_all_logits_is_made_forward_or_backward():
    vocab, length = 20_000, 300
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=vocab, **shape, num_key_value_heads=1, pad_token_id=None)
    model = LlamaForCausalLM(config)
    batch = collate_text([sequence("a", np.arange(length))])
    with LargestShare() as plain:
        inputs = {"input_ids": batch.input_ids, "labels": batch.input_ids}
        model(**inputs).loss.backward()
    accept_targets(model, vocab_size=vocab, chunk_positions=10)
    with LargestShare() as fused:
        model(**batch.features()).loss.backward()
    assert plain.size >= (length - 1) * vocab
    assert fused.size == 10 * vocab


def test_the_weight_of_a_step_is_that_of_its_labels_and_one_where_there_is_none(targets):
    first, second = [batch for batch, _ in zip(stream(targets), range(2), strict=False)]
    weight = float(first.position_weights.sum() + second.position_weights.sum())
    assert float(weight_of_step(first.features(), second.features())) == pytest.approx(weight)
    assert float(weight_of_step(first.without_weight().features())) == 1


def test_a_model_that_does_not_take_targets_gives_no_loss_for_them(targets):
    output = student()(**next(iter(stream(targets))).features())
    assert output.loss is None
    assert output.logits is not None


def test_a_trainer_without_the_class_for_targets_does_not_train_on_something_else(targets, tiny_model, tmp_path):
    rows = Dataset.from_list(list(target_rows(targets, alpha=0.5)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    for kind, config in ((Trainer, TrainingArguments), (SFTTrainer, SFTConfig)):
        own = {} if kind is Trainer else {"dataset_kwargs": {"skip_prepare_dataset": True}}
        settings = arguments(tmp_path, config, max_steps=1, remove_unused_columns=False, **own)
        collator = SoftLabelCollator()
        trainer = kind(student(), settings, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
        with pytest.raises((ValueError, KeyError, TypeError)):
            trainer.train()


def test_a_model_with_fewer_tokens_than_the_data_is_refused():
    with pytest.raises(VocabularyMismatch, match="60 tokens"):
        accept_targets(student(), vocab_size=61)


def test_targets_that_were_cast_to_less_precision_are_refused(targets):
    features = next(iter(stream(targets))).features()
    model = student()
    accept_targets(model, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="cast_forward_inputs"):
        model(**{**features, "position_weights": features["position_weights"].bfloat16()})


def plain_loop(model, batches, *, accumulation):
    """Without clipping and with a constant rate; plain descent, since Adam makes much of a gradient near 0."""
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=0.2)
    batches = iter(batches)
    while step := list(islice(batches, accumulation)):
        weight = sum(float(batch.position_weights.sum()) for batch in step)
        for batch in step:
            (dense_mean(model, batch.features()) * float(batch.position_weights.sum()) / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


@pytest.mark.parametrize(
    ("workers", "packing", "epochs", "accumulation"),
    [(0, False, 2, 2), (2, False, 2, 2), (0, True, 2, 2), (0, False, 1, 8), (2, False, 1, 8), (0, False, 1.5, 1)],
)
def test_trainer_takes_the_steps_of_a_plain_loop_to_the_end_of_the_last_epoch(
    targets, tmp_path, workers, packing, epochs, accumulation
):
    plain = stream(targets, packing=packing)
    batches = [batch for _ in range(int(epochs)) for batch in plain]
    batches += list(islice(plain, math.ceil(epochs % 1 * plain.batches_per_epoch(1))))
    assert accumulation == 1 or packing or plain.batches_per_epoch(0) % accumulation, "a step reaches over an epoch"
    expected = plain_loop(adapted(), batches, accumulation=accumulation)
    model, data = adapted(), stream(targets, packing=packing)
    changes = {"gradient_accumulation_steps": accumulation, "num_train_epochs": epochs}
    settings = arguments(tmp_path, dataloader_num_workers=workers, **changes)
    trainer = SoftLabelTrainer(model=model, args=settings, train_dataset=data, vocab_size=VOCAB)
    assert trainer.train().global_step == math.ceil(len(batches) / accumulation)
    torch.testing.assert_close(trained(model), expected, rtol=1e-4, atol=1e-5)


def test_trainer_logs_passes_over_the_stream_and_no_samples_that_it_has_not_counted(targets, tmp_path):
    data = stream(targets)
    settings = arguments(tmp_path, num_train_epochs=2, logging_steps=1)
    trainer = SoftLabelTrainer(model=adapted(), args=settings, train_dataset=data, vocab_size=VOCAB)
    metrics = trainer.train().metrics
    seen = [entry["epoch"] for entry in trainer.state.log_history]
    first, second = (data.batches_per_epoch(epoch) for epoch in (0, 1))
    expected = [(n + 1) / first for n in range(first)] + [1 + (n + 1) / second for n in range(second)]
    assert seen[: first + second] == pytest.approx(expected)
    assert seen[-1] == metrics["epoch"] == 2.0
    assert not any("samples_per_second" in name for entry in (metrics, *trainer.state.log_history) for name in entry)


def test_trainer_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(targets, tmp_path):
    def run(folder, *, until, resume=None, data=None):
        model = adapted()
        changes = {"gradient_accumulation_steps": 2, "max_steps": until, "save_strategy": "steps", "save_steps": 4}
        changes |= {"optim": "adamw_torch", "learning_rate": 0.02}
        trainer = SoftLabelTrainer(
            model=model, args=arguments(folder, **changes), train_dataset=data or stream(targets), vocab_size=VOCAB
        )
        trainer.train(resume_from_checkpoint=resume)
        return trained(model)

    whole = run(tmp_path / "whole", until=10)
    half = run(tmp_path / "halves", until=4)
    assert not torch.equal(half, whole)
    assert torch.equal(run(tmp_path / "halves", until=10, resume=True), whole)
    with pytest.raises(ResumeMismatch):
        run(tmp_path / "halves", until=10, resume=True, data=stream(targets, seed=4))


def test_a_training_that_is_complete_takes_no_step_when_it_is_resumed_and_more_epochs_when_asked_for(targets, tmp_path):
    def run(epochs, resume=None):
        model = adapted()
        changes = {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        settings = arguments(tmp_path / "run", **changes)
        trainer = SoftLabelTrainer(model=model, args=settings, train_dataset=stream(targets), vocab_size=VOCAB)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, trained(model)

    data = stream(targets)
    first, model = run(1)
    again, same = run(1, resume=True)
    assert first == again == data.batches_per_epoch(0)
    assert torch.equal(model, same)
    assert run(2, resume=True)[0] == data.batches_per_epoch(0) + data.batches_per_epoch(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_training_goes_on_with_the_next_epoch(targets, tmp_path, workers):
    data = stream(targets)
    settings = arguments(tmp_path, num_train_epochs=1, dataloader_num_workers=workers)
    trainer = SoftLabelTrainer(model=adapted(), args=settings, train_dataset=data, vocab_size=VOCAB)
    steps = [trainer.train().global_step for _ in range(2)]
    assert steps == [data.batches_per_epoch(0), data.batches_per_epoch(1)]
    plain = stream(targets)
    expected = plain_loop(adapted(), [batch for _ in range(2) for batch in plain], accumulation=1)
    torch.testing.assert_close(trained(trainer.model), expected, rtol=1e-4, atol=1e-5)


def test_a_stream_is_not_taken_to_evaluate_on(targets, tmp_path):
    with pytest.raises(ValueError, match="target_rows"):
        SoftLabelTrainer(
            model=adapted(), args=arguments(tmp_path), eval_dataset={"some": stream(targets)}, vocab_size=VOCAB
        )


def test_trainer_and_sft_trainer_train_alike_on_rows_and_evaluate_them(targets, tiny_model, tmp_path):
    data = Dataset.from_generator(target_rows, gen_kwargs={"targets": targets, "alpha": 0.5, "weights": WEIGHTS})
    assert len(data) == 34
    changes = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 1}
    ends = []
    for kind, config in ((SoftLabelTrainer, TrainingArguments), (SoftLabelSFT, SFTConfig)):
        own = {} if config is TrainingArguments else {"dataset_kwargs": {"skip_prepare_dataset": True}}
        model = adapted()
        trainer = kind(
            model=model,
            args=arguments(tmp_path / config.__name__, config, **changes, **own),
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            data_collator=SoftLabelCollator(),
            processing_class=PreTrainedTokenizerFast.from_pretrained(tiny_model),
            vocab_size=VOCAB,
        )
        trainer.train()
        ends.append(trained(model))
        found = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            expected = dense_mean(model.eval(), SoftLabelCollator()(data.select(range(8)).to_list()))
        assert found == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], trained(adapted()))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_in_any_order_collate_to_what_the_data_set_gives(targets, packing):
    data = stream(targets, packing=packing, prefetch=0)
    columns = Dataset.from_generator(target_rows, gen_kwargs={"targets": targets, "alpha": 0.5, "weights": WEIGHTS})
    order = data.epoch_order(0)
    for number, batch in enumerate(data):
        taken = [columns[row] for row in order.rows_in([number])]
        features, expected = SoftLabelCollator(packing=packing)(taken), batch.features()
        assert features.keys() == expected.keys()
        for name, item in expected.items():
            assert torch.equal(torch.as_tensor(features[name]), torch.as_tensor(item)), name


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_keep_a_ghost_token_and_what_it_stands_for(heads, alpha):
    data = stream(heads, alpha=alpha, weights=None, prefetch=0)
    columns = list(target_rows(heads, alpha=alpha))
    features = SoftLabelCollator()([columns[row] for row in data.epoch_order(0).rows_in([0])])
    expected = next(iter(data)).features()
    assert torch.equal(features["tail_mass"], expected["tail_mass"])
    assert torch.equal(features["entry_in_head"], expected["entry_in_head"])


def padded_as_axolotl(given):
    """Tensors of rows padded on the right, as the kd plugin's collator documents its own."""
    length = max(len(one["input_ids"]) for one in given)
    width = max(len(entries) for one in given for entries in one["target_mask"])
    padded = {}
    for name, filler in (("target_token_ids", 0), ("target_logprobs", -1e9), ("target_mask", 0)):
        full = torch.full((len(given), length, width), filler, dtype=torch.double if filler else torch.long)
        for index, one in enumerate(given):
            for place, entries in enumerate(one[name]):
                full[index, place, : len(entries)] = torch.tensor(entries, dtype=full.dtype)
        padded[name] = full
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        padded[name] = torch.tensor([one[name] + [filler] * (length - len(one[name])) for one in given])
    return padded


def test_axolotl_rows_give_its_loss_the_renormalised_targets(heads):
    given = list(axolotl_rows(heads))
    assert all(len(one["target_mask"]) == len(one["input_ids"]) == len(one["labels"]) for one in given)
    batch, model = padded_as_axolotl(given), student()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logp = torch.log_softmax(logits[..., :VOCAB], dim=-1).gather(-1, batch["target_token_ids"])
    kept = batch["target_mask"].bool()
    cross_entropy = -(batch["target_logprobs"][kept].exp() * logp[kept]).sum() / (batch["labels"] != -100).sum()
    accept_targets(model, vocab_size=VOCAB)
    ours = SoftLabelCollator()(list(target_rows(heads, alpha=0.0, truncated="renormalise")))
    torch.testing.assert_close(model(**ours).loss.double(), cross_entropy, rtol=1e-5, atol=0)
    sums = torch.where(kept, batch["target_logprobs"].exp(), 0.0).sum(-1)[kept.any(-1)]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=0)


def dense_kl_of_heads(given, logits, *, over_heads):
    """KL of the renormalised heads to the student, label by label; `over_heads`: the student's are renormalised too."""
    total, labels = 0.0, 0
    for index, columns in enumerate(given):
        for place, (ids, logprobs, mask) in enumerate(
            zip(columns["target_token_ids"], columns["target_logprobs"], columns["target_mask"], strict=True)
        ):
            if any(mask):
                q = torch.softmax(logits[index, place, :VOCAB], dim=-1)[ids]
                q = q / q.sum() if over_heads else q
                p = torch.tensor(logprobs, dtype=torch.double).exp()
                total, labels = total + float((p * (p / q).log()).sum()), labels + 1
    return total / labels


def kl_of_axolotl(batch, logits, *, normalize_topk):
    """The forward KL of the plugin, over the k entries of the padded batch, of which the mask keeps some."""
    logp = torch.log_softmax(logits[..., :VOCAB], dim=-1).gather(-1, batch["target_token_ids"])
    if normalize_topk:
        logp = logp - logp.logsumexp(dim=-1, keepdim=True)
    kept = batch["target_mask"].bool()
    p = batch["target_logprobs"][kept].exp()
    return float((p * (batch["target_logprobs"][kept] - logp[kept])).sum() / (batch["labels"] != -100).sum())


@pytest.mark.parametrize("normalize_topk", [False, True])
@pytest.mark.parametrize("kind", ["topk", "nucleus"])
@pytest.mark.filterwarnings("ignore:these heads have different lengths")
def test_axolotl_has_the_kl_of_the_heads_in_each_mode_that_the_page_allows(tmp_path, kind, normalize_topk):
    rng = np.random.default_rng(1)
    store, manifest = write_targets(tmp_path, [[row(f"{n:032d}", 9, rng, kind=kind) for n in range(4)]], kind=kind)
    given = list(axolotl_rows(TargetSet(store=store, manifest=manifest)))
    batch = padded_as_axolotl(given)
    with torch.no_grad():
        logits = student()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    found = kl_of_axolotl(batch, logits, normalize_topk=normalize_topk)
    right = dense_kl_of_heads(given, logits, over_heads=normalize_topk)
    if kind == "nucleus" and normalize_topk:
        assert abs(found - right) > 0.1, "the page says that this mode is wrong for such heads"
    else:
        assert found == pytest.approx(right, rel=1e-6)


def test_heads_of_different_lengths_warn_of_the_mode_that_is_wrong_for_them(tmp_path, heads):
    rng = np.random.default_rng(1)
    store, manifest = write_targets(tmp_path, [[row("0" * 32, 9, rng, kind="nucleus")]], kind="nucleus")
    with pytest.warns(UserWarning, match="leave `kd_normalize_topk` unset or false"):
        next(axolotl_rows(TargetSet(store=store, manifest=manifest)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(axolotl_rows(heads))


def test_a_sampled_tail_is_not_given_to_axolotl(targets):
    with pytest.raises(ValueError, match="threshold"):
        next(axolotl_rows(targets))


def test_mixed_precision_of_trainer_leaves_targets_and_loss_in_float32(targets, tmp_path):
    exact, model = adapted(), adapted()
    changes = {"max_steps": 2, "bf16": True}
    trainer = SoftLabelTrainer(
        model=model, args=arguments(tmp_path, **changes), train_dataset=stream(targets), vocab_size=VOCAB
    )
    expected = plain_loop(exact, islice(stream(targets), 2), accumulation=1)
    losses = []
    model.register_forward_hook(lambda *call: losses.append(call[-1].loss.dtype))
    trainer.train()
    assert losses == [torch.float32] * 2
    start = trained(adapted())
    assert (trained(model) - expected).norm() < 0.05 * (expected - start).norm()
