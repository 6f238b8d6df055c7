"""Two processes over gloo with DDP, FSDP and Trainer: what they learn is what one process learns."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from fakes.ranks import on_ranks
from fakes.students import student
from fakes.targets import VOCAB, numbered_parts, write_targets
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mixing import LabelWeights
from softshard.data.target_set import TargetSet
from softshard.errors import ShardedTwice
from softshard.integrations.causal_lm import accept_targets, weight_of_step
from softshard.integrations.rows import SoftLabelCollator, target_rows
from softshard.integrations.trainer import SoftLabelTraining
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore

STEPS, SMALL = 3, 24


class SoftLabelTrainer(SoftLabelTraining, Trainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    store, manifest = write_targets(root, numbered_parts(np.random.default_rng(0), (20, 13)))
    write_manifest(store, manifest)
    return root


def stream(folder, batch_tokens=64, packing=False, **place):
    store = LocalStore(folder)
    weights = LabelWeights(entropy=((0.0, 0.0), (4.0, 3.0)))
    settings = {"shuffle_buffer": 8, "alpha": 0.5, "weights": weights}
    settings |= {"packing": packing, "batch_tokens": 50 if packing else batch_tokens}
    targets = TargetSet(store=store, manifest=read_manifest(store))
    data = (SoftLabelDataset(targets, seed=seed, **settings, **place) for seed in range(100))
    # With two ranks the last round then has a batch for the first alone.
    return next(one for one in data if one.num_batches(0) % 2 == 1)


def adapted(*, dtype=torch.float32, adapter=True, tied=False, packing=False):
    """The same adapter, not 0, wherever it is made; or a student all of which is trained. Packing is the data's."""
    model = student(dtype=dtype, tied=tied)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        generator = torch.Generator().manual_seed(0)
        for item in model.parameters():
            if item.requires_grad:
                item.data = torch.randn(item.shape, generator=generator).to(dtype) * 0.1
    accept_targets(model, vocab_size=VOCAB, chunk_positions=16)
    return model


def gradients(model):
    """By name, whole, of what is trained."""
    found = {name.removeprefix("module."): item.grad for name, item in model.named_parameters() if item.requires_grad}
    return {name: item.full_tensor() if isinstance(item, DTensor) else item for name, item in found.items()}


def of_one_process(folder, model, *, packing):
    """Loss and gradients of the first round that two ranks share, and of the last, in which one has nothing."""
    batches = [batch.features() for batch in stream(folder, packing=packing, rank=0, world_size=1)]
    assert len(batches) % 2 == 1
    for step in (batches[:2], batches[-1:]):
        weight = weight_of_step(*step)
        losses = [model(**batch, num_items_in_batch=weight).loss for batch in step]
        model.zero_grad()
        sum(losses).backward()
        yield float(sum(losses).detach()), gradients(model)


def sharded(model):
    """FSDP2, each layer and the rest a unit."""
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model)


def head_alone(model):
    """The output layer a unit of its own, which is whole in no forward but its own."""
    fully_shard(model.get_output_embeddings())
    return sharded(model)


def prepared(model):
    return Accelerator(cpu=True).prepare(model)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "accelerate": prepared,
    "fsdp": sharded,
    "fsdp with the head alone": head_alone,
}
CASES = [
    ("ddp", {"dtype": torch.float64}),
    ("ddp", {}),
    ("ddp", {"adapter": False}),
    ("ddp", {"packing": True}),
    ("accelerate", {}),
    ("fsdp", {"dtype": torch.float64}),
    ("fsdp", {}),
    ("fsdp", {"adapter": False}),
    ("fsdp", {"adapter": False, "tied": True}),
    ("fsdp", {"packing": True}),
    ("fsdp with the head alone", {}),
    ("fsdp with the head alone", {"adapter": False}),
]


def on_two_ranks(rank, folder, out):
    for number, (wrapper, kind) in enumerate(CASES):
        rounds = [batch.features() for batch in stream(folder, packing=kind.get("packing", False))]
        assert bool(rounds[-1]["position_weights"].any()) == (rank == 0), "in the last round rank 1 has nothing"
        model = WRAPPERS[wrapper](adapted(**kind))
        if isinstance(model, FSDPModule):
            assert all(isinstance(item, DTensor) for item in model.parameters())
        found = []
        for batch in (rounds[0], rounds[-1]):
            model.zero_grad()
            loss = model(**batch, num_items_in_batch=weight_of_step(batch)).loss
            (loss * distributed.get_world_size()).backward()
            whole = loss.detach().clone()
            distributed.all_reduce(whole)
            found.append((float(whole), gradients(model)))
        if rank == 0:
            torch.save(found, out / f"{number}.pt")


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("found")
    on_ranks(on_two_ranks, 2, folder, out)
    return [torch.load(out / f"{number}.pt") for number in range(len(CASES))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}, {kind}" for name, kind in CASES])
def test_two_ranks_have_the_loss_and_gradients_of_one_process_on_the_global_batch(folder, found, number):
    _, kind = CASES[number]
    close = 1e-12 if kind.get("dtype") == torch.float64 else 1e-6
    for (loss, grads), (expected, reference) in zip(
        found[number], of_one_process(folder, adapted(**kind), packing=kind.get("packing", False)), strict=True
    ):
        assert loss == pytest.approx(expected, rel=close)
        assert grads.keys() == reference.keys()
        everything = torch.cat([item.flatten() for item in reference.values()]).norm()
        for name, item in reference.items():
            assert (grads[name] - item).norm() <= close * everything, name


def settings_of(folder, **changes):
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=0.2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )


def trained(model):
    return torch.cat([item.detach().flatten() for item in model.parameters() if item.requires_grad])


def with_trainer(rank, folder, out):
    model = student()
    changes = {"save_strategy": "steps", "save_steps": STEPS, "ddp_backend": "gloo"}
    trainer = SoftLabelTrainer(
        model=model,
        args=settings_of(out / "run", max_steps=2 * STEPS, **changes),
        train_dataset=stream(folder, SMALL),
        vocab_size=VOCAB,
    )
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    trainer.train()
    if rank == 0:
        torch.save(trained(model), out / "trained.pt")


def test_trainer_on_two_processes_and_from_its_checkpoint_on_one_takes_the_steps_of_one(folder, tmp_path):
    def alone(out, *, steps, resume=None):
        model = student()
        arguments = settings_of(out, max_steps=steps, gradient_accumulation_steps=2, save_strategy="no")
        data = stream(folder, SMALL, rank=0, world_size=1)
        assert data.batches_per_epoch(0) >= 4 * STEPS, "within an epoch, two ranks take two batches a step"
        trainer = SoftLabelTrainer(model=model, args=arguments, train_dataset=data, vocab_size=VOCAB)
        trainer.train(resume_from_checkpoint=resume)
        return trained(model)

    on_ranks(with_trainer, 2, folder, tmp_path)
    together = torch.load(tmp_path / "trained.pt")
    whole = alone(tmp_path / "alone", steps=2 * STEPS)
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-6)
    resumed = alone(tmp_path / "resumed", steps=2 * STEPS, resume=str(tmp_path / f"run/checkpoint-{STEPS}"))
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


def rows_with_trainer(rank, folder, out, accumulation):
    store = LocalStore(folder)
    targets = TargetSet(store=store, manifest=read_manifest(store))
    model = student()
    trainer = SoftLabelTrainer(
        model=model,
        args=settings_of(
            out / str(accumulation),
            max_steps=5,  # 30 of 33 rows: accelerate makes up a last batch for the other process
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
        ),
        train_dataset=list(target_rows(targets, alpha=0.5)),
        data_collator=SoftLabelCollator(),
        vocab_size=VOCAB,
    )
    steps = trainer.train().global_step
    if rank == 0:
        torch.save((steps, trained(model)), out / f"{accumulation}.pt")


def test_trainer_shards_rows_over_two_processes_as_it_accumulates_them_on_one(folder, tmp_path):
    on_ranks(rows_with_trainer, 2, folder, tmp_path, 1)
    rows_with_trainer(0, folder, tmp_path, 2)
    (together, model), (alone, expected) = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    assert together == alone == 5
    torch.testing.assert_close(model, expected, rtol=1e-5, atol=1e-6)


def without_the_mixin(rank, folder, out):
    arguments = settings_of(out / "run", max_steps=1, ddp_backend="gloo")
    loader = Trainer(student(), arguments, train_dataset=stream(folder)).get_train_dataloader()
    if rank == 0:  # the other would wait for what the first one is to send
        with pytest.raises(ShardedTwice, match="put `SoftLabelTraining` before Trainer"):
            next(iter(loader))
        (out / "refused").touch()


def test_a_trainer_that_would_deal_the_stream_again_says_so(folder, tmp_path):
    on_ranks(without_the_mixin, 2, folder, tmp_path)
    assert (tmp_path / "refused").exists()


def accumulated(rank, folder, out):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(adapted())
    step = [batch.features() for batch in islice(stream(folder), 2)]
    weight = weight_of_step(*step)
    for features in step:
        with accelerator.accumulate(model):
            loss = model(**features, num_items_in_batch=weight).loss
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
    if rank == 0:
        torch.save(gradients(model), out / "gradients.pt")


def test_steps_that_accelerate_accumulates_have_the_gradients_of_one_process(folder, tmp_path):
    on_ranks(accumulated, 2, folder, tmp_path)
    model, step = adapted(), [batch.features() for batch in islice(stream(folder, rank=0, world_size=1), 4)]
    weight = weight_of_step(*step)
    sum(model(**features, num_items_in_batch=weight).loss for features in step).backward()
    found, expected = torch.load(tmp_path / "gradients.pt"), gradients(model)
    everything = torch.cat([item.flatten() for item in expected.values()]).norm()
    for name, item in expected.items():
        assert (found[name] - item).norm() <= 1e-6 * everything, name


def every_row(batches):
    """Numbers of rows that have a target of some weight."""
    weighty = [batch for batch in batches if batch["position_weights"].any()]
    return [number for batch in weighty for number in (batch["input_ids"][:, :2] @ torch.tensor([VOCAB, 1])).tolist()]


class Watched(SoftLabelTrainer):
    """Keeps the batches that it was given to train on."""

    def get_batch_samples(self, *arguments):
        found = super().get_batch_samples(*arguments)
        self.seen = [*getattr(self, "seen", []), *found[0]]
        return found


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def in_epochs(rank, folder, out, name, stop, accumulation):
    """Two epochs, or what is left of them after the last checkpoint; stopped at some step, if at all."""
    resume = next(out.glob("run/checkpoint-*"), None)
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    trainer = Watched(
        model=student(),
        args=settings_of(out / "run", **settings),
        train_dataset=stream(folder, SMALL),
        vocab_size=VOCAB,
        callbacks=[StopAt(stop)],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    torch.save((every_row(trainer.seen), trainer.state.global_step), out / f"{name}-{rank}.pt")


@pytest.mark.parametrize(("before", "after", "stop"), [(1, 2, 7), (2, 1, 12)])
def test_epochs_that_are_resumed_on_another_number_of_processes_end_where_they_were_to(
    folder, tmp_path, before, after, stop
):
    seen = []
    for name, processes, step in (("first", before, stop), ("second", after, 0)):
        if processes > 1:
            on_ranks(in_epochs, processes, folder, tmp_path, name, step, 2)
        else:
            in_epochs(0, folder, tmp_path, name, step, 2)
        for rank in range(processes):
            numbers, steps = torch.load(tmp_path / f"{name}-{rank}.pt")
            seen += numbers
            assert name == "second" or steps == stop
    assert sorted(seen) == sorted(2 * list(range(33)))


def made_before(rank, data, out, workers):
    batches = DataLoader(
        data, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    torch.save([every_row([batch.features()]) for batch in batches], out / f"{rank}.pt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_was_made_before_the_process_group_is_sharded_over_its_ranks(folder, tmp_path, workers):
    on_ranks(made_before, 2, stream(folder, SMALL), tmp_path, workers)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sorted(number for batches in ranks for batch in batches for number in batch) == list(range(33))


def sharded_over_one(rank, folder):
    arguments = settings_of(folder / "run", max_steps=1, ddp_backend="gloo")
    with pytest.raises(ValueError, match="sharded over 1 processes, there are 2"):
        SoftLabelTrainer(student(), arguments, train_dataset=stream(folder, rank=0, world_size=1), vocab_size=VOCAB)


def test_trainer_refuses_a_stream_that_is_sharded_over_another_number_of_processes(folder):
    on_ranks(sharded_over_one, 2, folder)


def evaluated(rank, folder, out, packing):
    store = LocalStore(folder)
    weights = LabelWeights(entropy=((0.0, 0.0), (4.0, 3.0)))
    targets = TargetSet(store=store, manifest=read_manifest(store))
    rows = list(target_rows(targets, alpha=0.5, weights=weights))
    trainer = SoftLabelTrainer(
        student(),
        settings_of(out / "run", per_device_eval_batch_size=5),
        data_collator=SoftLabelCollator(packing=packing),
        vocab_size=VOCAB,
    )
    torch.save((len(rows), trainer.evaluate(rows)["eval_loss"]), out / f"{distributed.is_initialized()}.pt")


@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_find_the_evaluation_loss_of_one(folder, tmp_path, packing):
    on_ranks(evaluated, 2, folder, tmp_path, packing)
    evaluated(0, folder, tmp_path, packing)
    (rows, together), (_, alone) = (torch.load(tmp_path / f"{name}.pt") for name in (True, False))
    assert rows % 10, "accelerate repeats rows to fill up the last batch"
    assert together == pytest.approx(alone, rel=1e-6)
