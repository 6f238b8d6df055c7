"""Two processes over gloo with DDP, FSDP and Trainer: what they learn is what one process learns."""

from __future__ import annotations

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
from transformers import Trainer, TrainingArguments

from ranks import on_ranks
from softshard.errors import ShardedTwice
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore
from softshard.train.columns import SoftLabelCollator, target_rows
from softshard.train.dataset import SoftLabelDataset
from softshard.train.mixed import LabelWeights
from softshard.train.reading import TargetSet
from softshard.train.student import accept_targets, weight_of_step
from softshard.train.trainer import SoftLabelTraining
from tiny_students import student
from tiny_targets import VOCAB, numbered_parts, write_targets

STEPS, SMALL = 3, 24


class SoftLabelTrainer(SoftLabelTraining, Trainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    store, manifest = write_targets(root, numbered_parts(np.random.default_rng(0), (20, 13)))
    write_manifest(store, manifest)
    return root


def stream(folder, batch_tokens=64, **place):
    store = LocalStore(folder)
    weights = LabelWeights(entropy=((0.0, 0.0), (4.0, 3.0)))
    settings = {"batch_tokens": batch_tokens, "shuffle_buffer": 8, "alpha": 0.5, "weights": weights}
    targets = TargetSet(store=store, manifest=read_manifest(store))
    data = (SoftLabelDataset(targets, seed=seed, **settings, **place) for seed in range(100))
    # With two ranks the last round then has a batch for the first alone.
    return next(one for one in data if one.num_batches(0) % 2 == 1)


def adapted(*, dtype=torch.float32, adapter=True, tied=False):
    """The same adapter, not 0, wherever it is made; or a student all of which is trained."""
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


def of_one_process(folder, model):
    """Loss and gradients of the first round that two ranks share, and of the last, in which one has nothing."""
    batches = [batch.features() for batch in stream(folder, rank=0, world_size=1)]
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
    ("accelerate", {}),
    ("fsdp", {"dtype": torch.float64}),
    ("fsdp", {}),
    ("fsdp", {"adapter": False}),
    ("fsdp", {"adapter": False, "tied": True}),
    ("fsdp with the head alone", {}),
    ("fsdp with the head alone", {"adapter": False}),
]


def on_two_ranks(rank, folder, out):
    rounds = [batch.features() for batch in stream(folder)]
    assert bool(rounds[-1]["position_weights"].any()) == (rank == 0), "in the last round rank 1 has nothing"
    for number, (wrapper, kind) in enumerate(CASES):
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
        found[number], of_one_process(folder, adapted(**kind)), strict=True
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


def test_trainer_deals_rows_to_two_processes_as_it_accumulates_them_on_one(folder, tmp_path):
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
