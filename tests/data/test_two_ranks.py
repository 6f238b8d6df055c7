"""Two and three processes over gloo: what each of them gets, and what comes after a stop."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from accelerate.utils import DataLoaderConfiguration
from torch import distributed
from torch.utils.data import DataLoader

from fakes.ranks import on_ranks
from fakes.targets import numbered_parts, numbers_in, write_targets
from softshard.data.dataset import SoftLabelDataset
from softshard.data.target_set import TargetSet
from softshard.errors import ShardedTwice
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore

NUM_ROWS = 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    store, manifest = write_targets(root, numbered_parts(np.random.default_rng(0), (20, 14)))
    write_manifest(store, manifest)
    return root


def dataset(folder, **place):
    store = LocalStore(folder)
    settings = {"seed": 3, "batch_tokens": 48, "shuffle_buffer": 8, "alpha": 0.5}
    return SoftLabelDataset(TargetSet(store=store, manifest=read_manifest(store)), **settings, **place)


def epoch_by_default(rank, folder, out, workers):
    """An epoch with rank and world size taken from the group; a collective a step hangs where ranks differ in steps."""
    data, given = dataset(folder), []
    for batch in DataLoader(data, batch_size=None, num_workers=workers):
        tokens = torch.tensor(batch.num_tokens)
        distributed.all_reduce(tokens)
        given.append((numbers_in(batch), int(tokens)))
    (out / f"{rank}.json").write_text(json.dumps(given))


@pytest.mark.parametrize(("world_size", "workers"), [(2, 2), (3, 0)])
def test_every_sequence_comes_exactly_once_an_epoch_and_ranks_take_as_many_steps(folder, tmp_path, world_size, workers):
    on_ranks(epoch_by_default, world_size, folder, tmp_path, workers)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert len({len(given) for given in by_rank}) == 1
    assert Counter(n for given in by_rank for names, _ in given for n in names) == Counter(range(NUM_ROWS))
    alone = [list(numbers_in(batch)) for batch in dataset(folder, rank=0, world_size=1)]
    together = [names for step in zip(*by_rank, strict=True) for names, _ in step if names]
    assert together == alone


def stops_and_resumes(rank, folder, out):
    """Stop after each step on 1, 2 and 3 ranks, and go on from there on 1, 2 and 3."""
    for before, after in itertools.product((1, 2, 3), repeat=2):
        states = [None] * 3
        if rank < before:
            data = dataset(folder, rank=rank, world_size=before)
            steps = [(numbers_in(batch), data.state_dict()) for batch in data]
        distributed.all_gather_object(states, steps if rank < before else None)
        rests = []
        for step in range(len(states[0])):
            assert len({json.dumps(given[step][1]) for given in states if given}) == 1, "all ranks have one state"
            if rank < after:
                data = dataset(folder, rank=rank, world_size=after)
                data.load_state_dict(states[0][step][1])
                rests.append([numbers_in(batch) for batch in data])
        gathered = [None] * 3
        distributed.all_gather_object(gathered, rests if rank < after else None)
        if rank == 0:
            record = {"before": [g and [n for n, _ in g] for g in states], "after": gathered}
            (out / f"{before}-{after}.json").write_text(json.dumps(record))


def in_global_order(by_rank):
    return [names for step in zip(*by_rank, strict=True) for names in step if names]


def test_a_stop_after_any_step_resumes_on_any_number_of_ranks_with_the_rest_in_order(folder, tmp_path):
    on_ranks(stops_and_resumes, 3, folder, tmp_path)
    first, second = dataset(folder, rank=0, world_size=1), dataset(folder, rank=0, world_size=1)
    second.set_epoch(1)
    whole, following = ([list(numbers_in(batch)) for batch in data] for data in (first, second))
    for before, after in itertools.product((1, 2, 3), repeat=2):
        record = json.loads((tmp_path / f"{before}-{after}.json").read_text())
        steps = record["before"][:before]
        rests = record["after"][:after]
        assert len(rests[0]) == len(steps[0])
        for step in range(len(steps[0])):
            seen = in_global_order([given[: step + 1] for given in steps])
            rest = in_global_order([given[step] for given in rests])
            assert seen + rest == whole if seen != whole else rest == following


def _one(batches):
    return {"input_ids": batches[0].input_ids}


BATCHES = {"batch_size": None}
SAMPLES = {"batch_size": 1, "collate_fn": _one, "num_workers": 1}


def prepared(settings, loader):
    """A loader through accelerate; one that dispatches has the other ranks wait for the first, so it alone reads."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    assert accelerator.num_processes == 2
    ready = accelerator.prepare(loader)
    if accelerator.is_main_process or not isinstance(ready, DataLoaderDispatcher):
        next(iter(ready))


def wrapped(settings, loader):
    shard = IterableDatasetShard(loader.dataset, num_processes=2, process_index=distributed.get_rank())
    next(iter(DataLoader(shard, batch_size=None, **settings)))


CASES = [
    (prepared, {}, BATCHES, (0,)),
    (prepared, {}, SAMPLES, (0,)),
    (prepared, {"dispatch_batches": False}, BATCHES, (0, 1)),
    (prepared, {"dispatch_batches": False}, SAMPLES, (0, 1)),
    (wrapped, {"num_workers": 0}, BATCHES, (0, 1)),
    (wrapped, {"num_workers": 1}, BATCHES, (0, 1)),
]


def through_accelerate(rank, folder, out):
    for number, (way, settings, loader, _) in enumerate(CASES):
        problem = ""
        try:
            way(settings, DataLoader(dataset(folder), **loader))
        except (ShardedTwice, RuntimeError) as error:  # torch passes a worker's error on as a RuntimeError
            problem = str(error)
        (out / f"{number}-{rank}.txt").write_text(problem)


def test_accelerate_does_not_deal_a_second_time(folder, tmp_path):
    on_ranks(through_accelerate, 2, folder, tmp_path)
    for number, (*_, refused_on) in enumerate(CASES):
        for rank in refused_on:
            assert "already sharded them over ranks" in (tmp_path / f"{number}-{rank}.txt").read_text(), (number, rank)
