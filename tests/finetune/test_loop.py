from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fakes.targets import row, sequence, write_targets
from softshard.config import LoraSettings, OptimizerSettings
from softshard.data.dataset import SoftLabelDataset
from softshard.data.target_set import TargetSet
from softshard.data.text import TextBatches
from softshard.errors import ModelInvalid, ResumeMismatch, TrainingDiverged
from softshard.finetune.adapters.lora import save_adapter
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import fine_tune, learning_rate_at
from softshard.finetune.retention import Retention
from softshard.models import load_model, load_tokenizer
from softshard.storage import LocalStore

VOCAB = 300
LORA = LoraSettings(rank=4, dropout=0.1)
OPTIMIZER = OptimizerSettings(epochs=2, learning_rate=5e-3, batch_tokens=200, checkpoint_steps=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost a model of this size more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sequences(tiny_model, texts):
    tokenizer = load_tokenizer(tiny_model)
    return [sequence(f"text {n}", ids) for n, ids in enumerate(tokenizer.encode(texts))]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [row(f"{n}", int(rng.integers(8, 20)), rng, vocab=VOCAB) for n in range(24)]
    return write_targets(tmp_path_factory.mktemp("targets"), [rows[:15], rows[15:]], vocab=VOCAB)


def kept_in(folder):
    return Checkpoint(store=LocalStore(folder), path="checkpoint.pt")


def text_batches(sequences, *, name="style", batch_tokens=200):
    return TextBatches(sequences, seed=0, batch_tokens=batch_tokens, name=name)


def soft_batches(targets, *, alpha=0.5, batch_tokens=100):
    store, manifest = targets
    return SoftLabelDataset(
        TargetSet(store=store, manifest=manifest), seed=0, batch_tokens=batch_tokens, shuffle_buffer=8, alpha=alpha
    )


def train(folder, batches, *, model=None, dtype=torch.float32, **changes):
    arguments = {
        "lora": LORA,
        "optimizer": OPTIMIZER,
        "retention": None,
        "seed": 0,
        "num_valid": VOCAB,
        "chunk_positions": 64,
        "checkpoint": None,
        "identity": "tiny",
        **changes,
    }
    return fine_tune(model or load_model(folder, dtype=dtype, device="cpu"), batches, **arguments)


def test_first_loss_with_alpha_one_is_the_models_own_shifted_cross_entropy(tiny_model, sequences):
    source = text_batches(sequences, batch_tokens=10**6)
    batch = next(iter(text_batches(sequences, batch_tokens=10**6)))
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.item()
    tuned = train(tiny_model, source, lora=LoraSettings(rank=4), num_valid=320)
    assert tuned.log[0].loss == pytest.approx(expected, rel=1e-5)
    assert tuned.log[0].tokens == sum(len(item.token_ids) for item in sequences)


def test_first_loss_on_stored_targets_is_their_cross_entropy_under_the_model(tiny_model, targets):
    batch = next(iter(soft_batches(targets)))
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions, :VOCAB].double()
    logs = torch.log_softmax(logits, dim=1)
    rows = torch.arange(len(batch.labels)).repeat_interleave(batch.entry_offsets.diff())
    expected = -(batch.entry_weights * logs[rows, batch.entry_ids]).sum() / len(batch.labels)
    tuned = train(tiny_model, soft_batches(targets), lora=LoraSettings(rank=4))
    assert tuned.log[0].loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_falls_on_a_tiny_corpus(tiny_model, sequences, dtype):
    settings = OptimizerSettings(epochs=12, learning_rate=1e-2)
    tuned = train(tiny_model, text_batches(sequences), dtype=dtype, optimizer=settings)
    losses = [step.loss for step in tuned.log]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 1
    assert not any(module.training for module in tuned.model.modules())


def test_training_moves_the_model_to_the_stored_targets(tiny_model, targets):
    settings = OptimizerSettings(epochs=12, learning_rate=1e-2)
    tuned = train(tiny_model, soft_batches(targets, alpha=0), optimizer=settings)
    losses = [step.loss for step in tuned.log]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


def mixed(targets, sequences):
    kept = Retention(batches=text_batches(sequences, name="retention", batch_tokens=120), weight=0.3, objective="kl")
    return soft_batches(targets), kept


class Stopped(KeyboardInterrupt):
    pass


def stop_after(number):
    def on_step(step):
        if step.step == number:
            raise Stopped

    return on_step


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, targets, sequences):
    source, kept = mixed(targets, sequences)
    return train(tiny_model, source, retention=kept)


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 4, 5), (-1,)])
def test_stopped_after_any_step_and_resumed_ends_with_the_same_bits(
    tiny_model, targets, sequences, uninterrupted, tmp_path, stops
):
    kept_state = kept_in(tmp_path / "state")
    total = len(uninterrupted.log)
    assert total > 6
    for stop in stops:
        source, kept = mixed(targets, sequences)
        torch.manual_seed(stop + 100)  # what the process drew before must not matter
        with pytest.raises(Stopped):
            train(tiny_model, source, retention=kept, checkpoint=kept_state, on_step=stop_after(stop % (total + 1)))
    source, kept = mixed(targets, sequences)
    seen = []
    resumed = train(tiny_model, source, retention=kept, checkpoint=kept_state, on_step=seen.append)
    assert save_adapter(resumed.model) == save_adapter(uninterrupted.model)
    assert resumed.log == uninterrupted.log
    assert [step.step for step in seen] == list(range(stops[-1] % (total + 1) + 1, total + 1))


class Breaking:
    """A source that is interrupted while it makes a batch."""

    def __init__(self, source, at):
        self.source, self.at = source, at

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __iter__(self):
        for number, batch in enumerate(self.source, start=1):
            if number == self.at:
                raise Stopped
            yield batch


def test_an_interruption_within_a_step_resumes_at_its_beginning(
    tiny_model, targets, sequences, uninterrupted, tmp_path
):
    kept_state = kept_in(tmp_path)
    source, kept = mixed(targets, sequences)
    with pytest.raises(Stopped):
        train(tiny_model, Breaking(source, 5), retention=kept, checkpoint=kept_state)
    source, kept = mixed(targets, sequences)
    seen = []
    resumed = train(tiny_model, source, retention=kept, checkpoint=kept_state, on_step=seen.append)
    assert seen[0].step == 5
    assert save_adapter(resumed.model) == save_adapter(uninterrupted.model)


def test_a_killed_training_goes_on_from_its_last_checkpoint(tiny_model, targets, sequences, uninterrupted, tmp_path):
    kept_state = kept_in(tmp_path)

    def die(step):
        if step.step == 5:
            raise MemoryError

    source, kept = mixed(targets, sequences)
    with pytest.raises(MemoryError):
        train(tiny_model, source, retention=kept, checkpoint=kept_state, on_step=die)
    source, kept = mixed(targets, sequences)
    seen = []
    resumed = train(tiny_model, source, retention=kept, checkpoint=kept_state, on_step=seen.append)
    assert seen[0].step == OPTIMIZER.checkpoint_steps + 1
    assert save_adapter(resumed.model) == save_adapter(uninterrupted.model)


def test_a_finished_training_is_not_repeated(tiny_model, sequences, tmp_path):
    kept_state = kept_in(tmp_path)
    first = train(tiny_model, text_batches(sequences), checkpoint=kept_state)
    seen = []
    again = train(tiny_model, text_batches(sequences), checkpoint=kept_state, on_step=seen.append)
    assert seen == []
    assert save_adapter(again.model) == save_adapter(first.model)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "another"},
        {"seed": 1},
        {"lora": LoraSettings(rank=2)},
        {"optimizer": OptimizerSettings(epochs=1, learning_rate=1e-3, checkpoint_steps=3)},
    ],
)
def test_the_checkpoint_of_another_training_is_ignored(tiny_model, sequences, tmp_path, change):
    kept_state = kept_in(tmp_path)
    with pytest.raises(Stopped):
        train(tiny_model, text_batches(sequences), checkpoint=kept_state, on_step=stop_after(2))
    seen = []
    train(tiny_model, text_batches(sequences), checkpoint=kept_state, on_step=seen.append, **change)
    assert seen[0].step == 1


def test_another_alpha_is_another_training(tiny_model, targets, tmp_path):
    kept_state = kept_in(tmp_path)
    with pytest.raises(Stopped):
        train(tiny_model, soft_batches(targets), checkpoint=kept_state, on_step=stop_after(2))
    seen = []
    train(tiny_model, soft_batches(targets, alpha=0.2), checkpoint=kept_state, on_step=seen.append)
    assert seen[0].step == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_an_unreadable_checkpoint_is_ignored(tiny_model, sequences, tmp_path, content):
    kept_state, path = kept_in(tmp_path), tmp_path / "checkpoint.pt"
    if content is None:
        kept_state.write({"weights": torch.zeros(500)}, identity="x")
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(content)
    seen = []
    train(tiny_model, text_batches(sequences), checkpoint=kept_state, on_step=seen.append)
    assert seen[0].step == 1


def test_a_checkpoint_comes_back_as_it_was_written_and_leaves_no_other_file(tmp_path):
    state = {"weights": torch.arange(3.0), "log": [{"step": 1, "loss": 0.5}], "random": torch.get_rng_state()}
    kept_state = kept_in(tmp_path)
    kept_state.write({"weights": torch.zeros(2)}, identity="x")
    kept_state.write(state, identity="x")
    read = kept_state.read(identity="x")
    assert torch.equal(read["weights"], state["weights"])
    assert torch.equal(read["random"], state["random"])
    assert read["log"] == state["log"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["checkpoint.pt"]
    assert kept_state.read(identity="y") is None
    kept_state.remove()
    assert kept_state.read(identity="x") is None


def test_only_the_last_layers_have_gradients_and_nothing_below_is_tracked(tiny_model, sequences):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    tracked = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: tracked.append((args[0].requires_grad, output.requires_grad))
        )
    frozen = {name: item.clone() for name, item in model.named_parameters()}
    tuned = train(
        tiny_model, text_batches(sequences, batch_tokens=10**6), model=model, lora=LoraSettings(rank=4, last_layers=1)
    )
    assert tracked[-2:] == [(False, False), (False, True)]
    with_gradient = [name for name, item in tuned.model.named_parameters() if item.grad is not None]
    assert len(with_gradient) == 14
    assert all("layers.1." in name and "lora_" in name for name in with_gradient)
    base = dict(tuned.model.unload().named_parameters())
    assert all(torch.equal(base[name], item) for name, item in frozen.items())


def test_the_log_says_what_happened(tiny_model, targets, sequences):
    source, kept = mixed(targets, sequences)
    steps = []
    tuned = train(tiny_model, source, retention=kept, on_step=steps.append)
    per_epoch = soft_batches(targets).batches_per_epoch(0)
    assert tuple(steps) == tuned.log
    assert [step.step for step in steps] == list(range(1, 2 * per_epoch + 1))
    assert {step.total_steps for step in steps} == {2 * per_epoch}
    assert [step.epoch for step in steps[: per_epoch + 1]] == [0] * per_epoch + [1]
    assert steps[0].retention_loss == 0, "the base and the new adapter agree"
    assert steps[-1].retention_loss > 0
    plain = train(tiny_model, soft_batches(targets))
    assert plain.log[0].retention_loss is None
    assert save_adapter(plain.model) != save_adapter(tuned.model)


@pytest.mark.parametrize(("epochs", "share"), [(0.5, 0.5), (1.5, 1.5), (0.01, 0)])
def test_fractions_of_an_epoch_are_rounded_to_steps_and_there_is_at_least_one(tiny_model, sequences, epochs, share):
    per_epoch = text_batches(sequences).batches_per_epoch(0)
    assert per_epoch > 3
    tuned = train(tiny_model, text_batches(sequences), optimizer=OptimizerSettings(epochs=epochs))
    assert len(tuned.log) == max(1, round(share * per_epoch))


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth():
    settings = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.2)
    rates = [learning_rate_at(step, total_steps=10, settings=settings) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[5] == pytest.approx(0.55)  # half way down: the middle of 1 and .1
    assert rates[9] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))
    no_warmup = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.0)
    assert learning_rate_at(1, total_steps=1, settings=no_warmup) == pytest.approx(0.1)
    all_warmup = OptimizerSettings(learning_rate=1.0, warmup_fraction=0.9)
    assert learning_rate_at(1, total_steps=1, settings=all_warmup) == 1.0


def test_gradients_are_clipped(tiny_model, sequences):
    settings = OptimizerSettings(epochs=0.01, learning_rate=1.0, max_grad_norm=1e-3, warmup_fraction=0)
    batches = text_batches(sequences)
    tuned = train(tiny_model, batches, optimizer=settings)
    squares = sum(float((item.grad**2).sum()) for item in tuned.model.parameters() if item.grad is not None)
    assert tuned.log[0].grad_norm > 1e-2
    assert math.sqrt(squares) == pytest.approx(1e-3, rel=1e-3)


def test_dropout_of_the_adapter_is_on_and_that_of_the_base_is_off(tiny_model, sequences):
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    assert config.resid_pdrop == config.embd_pdrop == 0.1
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).requires_grad_(False)
    log = {}
    for dropout in (0.0, 0.5):
        lora = LoraSettings(rank=4, dropout=dropout)
        log[dropout] = train(None, text_batches(sequences), model=copy.deepcopy(base), lora=lora).log
    batch = next(iter(text_batches(sequences)))
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        expected = base.eval()(input_ids=batch.input_ids, labels=labels).loss.item()
    assert log[0.0][0].loss == pytest.approx(expected, rel=1e-5)
    assert log[0.5][0].loss == pytest.approx(expected, rel=1e-5), "a new adapter adds nothing that could be dropped"
    assert log[0.5][2].loss != log[0.0][2].loss


def test_the_outside_random_generator_is_left_alone(tiny_model, sequences):
    state = torch.get_rng_state()
    train(tiny_model, text_batches(sequences))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_is_named(tiny_model, sequences):
    def poison(step):
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.fill_(math.nan)

    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    with pytest.raises(TrainingDiverged, match="learning_rate") as caught:
        train(tiny_model, text_batches(sequences), model=model, on_step=poison)
    assert caught.value.step == 2


def test_a_model_whose_loss_would_be_wrong_is_refused_before_it_is_changed(tiny_model, sequences):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelInvalid, match="final_logit_softcapping"):
        train(tiny_model, text_batches(sequences), model=model)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_stream_state_of_other_data_is_refused(tiny_model, sequences, tmp_path):
    kept_state = kept_in(tmp_path)

    class Renamed(Breaking):
        digest = "the same for both"

        def state_dict(self):
            return {**self.source.state_dict(), "manifest": "the same for both"}

    with pytest.raises(Stopped):
        train(tiny_model, Renamed(text_batches(sequences), 0), checkpoint=kept_state, on_step=stop_after(1))
    with pytest.raises(ResumeMismatch):
        train(tiny_model, Renamed(text_batches(sequences), 0), checkpoint=kept_state)
