"""A training that can be stopped at any time and continued on a different number of processes.

    torchrun --standalone --nproc-per-node 2 examples/train_with_torchrun.py runs/demo --model MODEL --steps 100
    torchrun --standalone --nproc-per-node 3 examples/train_with_torchrun.py runs/demo --model MODEL --steps 200

A step takes the next `--step-batches` batches of the global order, or the rest of the epoch. The number of processes
must divide it: each process takes its share, and the gradients are those of the mean over the labels of all batches. So
the second command continues after the batch at which the first ended, with its weights and its optimiser's state, and
takes the same steps as the first would have. The state is kept in `--state`, and replaced whole after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from softshard import SoftLabelDataset, TargetSet, accept_targets, open_store, read_manifest, weight_of_step


def main() -> None:
    """Take the remaining steps; the first process prints each."""
    parser = argparse.ArgumentParser(description="Train an adapter from stored targets with torchrun.")
    parser.add_argument("out", type=Path, help="output folder of a job")
    parser.add_argument("--model", required=True, help="student: a folder, or a name on the hub")
    parser.add_argument("--state", type=Path, default=Path("training.pt"))
    parser.add_argument("--steps", type=int, default=100, help="total number of steps")
    parser.add_argument("--step-batches", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    arguments = parser.parse_args()
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if arguments.step_batches % distributed.get_world_size():
        parser.error(f"{distributed.get_world_size()} processes do not divide --step-batches {arguments.step_batches}")
    train(arguments)
    distributed.destroy_process_group()


def train(arguments: argparse.Namespace) -> None:
    """Load the state, if there is one, and train up to the requested number of steps."""
    store = open_store(str(arguments.out / "targets"))
    targets = TargetSet(store=store, manifest=read_manifest(store))
    data = SoftLabelDataset(targets, seed=0, batch_tokens=arguments.batch_tokens, shuffle_buffer=4096, alpha=0.5)
    model = student(arguments.model, vocab_size=data.metadata.vocab_size)
    adapter = {name: item for name, item in model.named_parameters() if item.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=arguments.learning_rate)
    done = 0
    if arguments.state.exists():
        saved = torch.load(arguments.state, weights_only=True)
        done = saved["step"]
        data.load_state_dict(saved["data"])
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, item in adapter.items():
                item.copy_(saved["adapter"][name])
    ranks = distributed.get_world_size()
    wrapped = DistributedDataParallel(model)
    while done < arguments.steps:
        epoch = iter(data)
        while done < arguments.steps and (batches := list(islice(epoch, arguments.step_batches // ranks))):
            loss = take_step(wrapped, optimizer, [batch.to(device()).features() for batch in batches])
            done += 1
            if distributed.get_rank() == 0:
                place = data.state_after(batches[-1])
                state = {"step": done, "data": place, "optimizer": optimizer.state_dict(), "adapter": adapter}
                save(state, arguments.state)
                print(json.dumps({"step": done, "epoch": place["epoch"], "batches": place["consumed"], "loss": loss}))


def student(name: str, *, vocab_size: int) -> Any:
    """A model with a new adapter, equal on every process, whose forward accepts targets."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear")).to(device())
    accept_targets(adapted, vocab_size=vocab_size)
    return adapted


def take_step(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]]) -> float:
    """One step on this process's batches; returns the mean loss over the labels of all processes' batches."""
    weight, total = weight_of_step(*batches), torch.zeros((), device=device())
    for number, batch in enumerate(batches, 1):
        # Gradients are averaged over processes only once, with the last batch.
        with contextlib.nullcontext() if number == len(batches) else model.no_sync():
            loss = model(**batch, num_items_in_batch=weight).loss
            (loss * distributed.get_world_size()).backward()
            total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    distributed.all_reduce(total)
    return total.item()


def save(state: dict[str, Any], path: Path) -> None:
    """Replace the file atomically: if the process is killed, the previous state remains."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


if __name__ == "__main__":
    main()
