"""The data set in loaders: prefetch, DataLoader workers, torchdata's StatefulDataLoader."""

from __future__ import annotations

import itertools
import pickle
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from fakes.targets import numbered_parts, numbers_in, write_targets
from softshard.data.dataset import SoftLabelDataset
from softshard.data.prefetch import prefetched
from softshard.data.target_set import TargetSet
from softshard.errors import PartCorrupt, ResumeMismatch

SETTINGS = {"seed": 1, "batch_tokens": 64, "shuffle_buffer": 20, "alpha": 0.5}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    parts = numbered_parts(np.random.default_rng(0), (30, 12))
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), parts)
    return TargetSet(store=store, manifest=manifest)


def dataset(targets, **changes):
    return SoftLabelDataset(targets, **{**SETTINGS, "rank": 0, "world_size": 1, "prefetch": 0, **changes})


def loader(data, workers, **settings):
    return DataLoader(data, batch_size=None, num_workers=workers, **settings)


def numbers(batches):
    return [numbers_in(batch) for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_batches_of_a_plain_loop(targets, workers):
    plain = list(dataset(targets))
    loaded = list(loader(dataset(targets), workers))
    assert numbers(loaded) == numbers(plain)
    for one, other in zip(loaded, plain, strict=True):
        assert torch.equal(one.entry_ids, other.entry_ids)
        assert torch.equal(one.entry_weights, other.entry_weights)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_a_state_after_any_batch_is_taken_up_by_another_number_of_workers(targets, before, after):
    whole = numbers(dataset(targets))
    for stopped_at in (1, 4, len(whole) - 1, len(whole)):
        data = dataset(targets)
        batches = loader(data, before)
        *_, last = itertools.islice(batches, stopped_at)
        resumed = dataset(targets)
        resumed.load_state_dict(data.state_after(last))
        rest = numbers(loader(resumed, after))
        assert rest == (whole[stopped_at:] or numbers(_in_epoch(dataset(targets), 1)))


def _in_epoch(data, epoch):
    data.set_epoch(epoch)
    return data


def test_set_epoch_tells_workers_which_epoch_it_is_and_keeps_a_place_within_it(targets):
    data = dataset(targets)
    batches = loader(data, 2)
    first = numbers(batches)
    data.set_epoch(1)
    second = numbers(batches)
    assert first != second
    assert sorted(sum(second, ())) == list(range(42))
    one = next(iter(dataset(targets)))
    data.load_state_dict(data.state_after(one))
    data.set_epoch(0)
    assert numbers(batches) == first[1:]


def living(data, workers=2, **settings):
    return loader(data, workers, persistent_workers=True, **settings)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_live_on_give_one_epoch_after_the_other_and_hear_what_the_loop_says(targets, context):
    epochs = [numbers(_in_epoch(dataset(targets), epoch)) for epoch in range(4)]
    data = dataset(targets)
    batches = living(data, multiprocessing_context=context)
    assert [numbers(batches) for _ in range(2)] == epochs[:2]
    data.set_epoch(3)
    assert numbers(batches) == epochs[3]
    data.set_epoch(0)
    *_, last = itertools.islice(batches, 3)
    data.load_state_dict(data.state_after(last))
    assert numbers(batches) == epochs[0][3:]
    assert numbers(batches) == epochs[1]


def test_workers_that_live_on_begin_again_what_the_loop_broke_off(targets):
    epochs = [numbers(_in_epoch(dataset(targets), epoch)) for epoch in range(2)]
    batches = living(dataset(targets))
    assert numbers(itertools.islice(batches, 2)) == epochs[0][:2]
    assert numbers(batches) == epochs[0]
    assert numbers(itertools.islice(batches, 2)) == epochs[1][:2]
    assert numbers(batches) == epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_after_any_batch(targets, workers):
    whole = numbers(dataset(targets))
    for stopped_at in (1, 2, 5):
        first = StatefulDataLoader(dataset(targets), batch_size=None, num_workers=workers)
        given = numbers(itertools.islice(first, stopped_at))
        second = StatefulDataLoader(dataset(targets), batch_size=None, num_workers=workers)
        second.load_state_dict(first.state_dict())
        assert given + numbers(second) == whole


def test_the_state_of_a_worker_is_refused_elsewhere(targets):
    data = dataset(targets)
    data.load_state_dict({**data.state_dict(), "worker": [0, 2, 1], "given": 1})
    with pytest.raises(ResumeMismatch, match="worker"):
        next(iter(data))


def test_prefetch_changes_neither_batches_nor_the_state_after_each(targets):
    plain, ahead = dataset(targets), dataset(targets, prefetch=3)
    for one, other in zip(plain, ahead, strict=True):
        assert numbers_in(one) == numbers_in(other)
        assert plain.state_dict() == ahead.state_dict()


def test_prefetched_items_are_made_ahead_but_no_more_than_asked():
    made, reached = [], threading.Event()

    def items():
        for item in range(10):
            made.append(item)
            if item == 3:
                reached.set()
            yield item

    taken = prefetched(items(), ahead=3)
    assert next(taken) == 0
    assert reached.wait(5)
    assert made == [0, 1, 2, 3]
    taken.close()
    assert made == [0, 1, 2, 3]
    assert "softshard-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_an_error_ahead_comes_at_its_place(targets, tmp_path):
    store, manifest = write_targets(tmp_path, numbered_parts(np.random.default_rng(0), (4, 4)))
    data = dataset(TargetSet(store=store, manifest=manifest), prefetch=4, shuffle_buffer=1, batch_tokens=1)
    assert len(list(data)) == 8
    second = data.epoch_order(1).row_groups[1][0]
    store.local_path(manifest.parts[second].path).write_bytes(b"PAR1")
    given = iter(data)
    assert len(list(itertools.islice(given, 4))) == 4
    with pytest.raises(PartCorrupt):
        next(given)


def test_a_pickled_data_set_goes_on_where_it_was(targets):
    data = dataset(targets)
    iterator = iter(data)
    next(iterator)
    assert numbers(pickle.loads(pickle.dumps(data))) == numbers(iterator)
