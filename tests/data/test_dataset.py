from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from fakes.targets import (
    VOCAB,
    encode_part,
    in_draws,
    manifest_of,
    metadata,
    numbered_parts,
    numbers_in,
    random_distributions,
    receipt,
    row,
    sequence,
    sketch,
    write_targets,
)
from softshard.data.dataset import SoftLabelDataset
from softshard.data.shuffle import batch_bounds, through_buffer
from softshard.data.target_set import TargetSet
from softshard.data.text import TextBatches, endless
from softshard.errors import CorpusEmpty, PartCorrupt, ResumeMismatch
from softshard.records.seeds import keyed_generator, keyed_seed
from softshard.storage import LocalStore

SETTINGS = {"seed": 1, "batch_tokens": 64, "shuffle_buffer": 20, "alpha": 0.5, "truncated": "ghost"}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Three parts of 70, 5 and 66 sequences (row groups hold 64), each with tokens of its own."""
    parts = numbered_parts(np.random.default_rng(0), (70, 5, 66))
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), parts)
    return store, manifest, [tokens for rows in parts for tokens, _ in rows]


def stream(targets, **changes):
    store, manifest, *_ = targets
    set_settings = {name: changes.pop(name) for name in ("split", "where") if name in changes}
    settings = {**SETTINGS, "prefetch": 0, "rank": 0, "world_size": 1, **changes}
    return SoftLabelDataset(TargetSet(store=store, manifest=manifest, **set_settings), **settings)


def epoch_of(source, epoch=0):
    return [numbers_in(batch) for batch in itertools.islice(source, source.batches_per_epoch(epoch))]


def in_global_order(by_rank):
    return [batch for together in zip(*by_rank, strict=True) for batch in together if batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sequence_comes_exactly_once_an_epoch_on_any_number_of_ranks(targets, world_size):
    by_rank = [epoch_of(stream(targets, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in by_rank}) == 1, "all ranks take the same number of steps"
    assert Counter(name for batches in by_rank for batch in batches for name in batch) == Counter(range(141))
    assert in_global_order(by_rank) == epoch_of(stream(targets))


def test_the_last_round_is_filled_with_batches_of_weight_zero(targets):
    number = len(epoch_of(stream(targets)))
    world_size = next(size for size in (2, 3, 4, 5) if number % size)
    last = [
        list(itertools.islice(stream(targets, rank=r, world_size=world_size), -(-number // world_size)))[-1]
        for r in range(world_size)
    ]
    weightless = [not batch.position_weights.any() for batch in last]
    assert weightless == [rank >= number % world_size for rank in range(world_size)]
    assert all(batch.input_ids.numel() for batch in last)


def test_batches_hold_the_sequences_as_they_were_written(targets):
    for batch in itertools.islice(stream(targets), 5):
        for name, ids, mask in zip(numbers_in(batch), batch.input_ids, batch.attention_mask, strict=True):
            assert ids[mask.bool()].tolist() == targets[2][name].token_ids.tolist()


def test_the_order_hangs_on_seed_and_epoch_and_is_the_same_each_time(targets):
    two = stream(targets)
    iterator = endless(two)
    first = [numbers_in(next(iterator)) for _ in range(two.batches_per_epoch(0))]
    second = [numbers_in(next(iterator)) for _ in range(two.batches_per_epoch(1))]
    assert first == epoch_of(stream(targets))
    assert first != second
    assert sorted(sum(second, ())) == list(range(141))
    assert first != epoch_of(stream(targets, seed=2))
    assert sorted(sum(first, ())) != list(sum(first, ()))


@pytest.mark.parametrize(("sizes", "buffer"), [((20,), 5), ((3, 4, 5), 1), ((200,), 1)])
def test_rows_parts_and_row_groups_each_have_another_order_in_another_epoch(tmp_path, sizes, buffer):
    """Within a buffer; among parts that no buffer mixes; among the row groups of one part."""
    rng = np.random.default_rng(2)
    parts = [[row(f"{size} {n}", 4, rng) for n in range(size)] for size in sizes]
    store, manifest = write_targets(tmp_path, parts)
    iterator = endless(stream((store, manifest), shuffle_buffer=buffer, batch_tokens=4))
    epochs = [tuple(tuple(next(iterator).input_ids.flatten().tolist()) for _ in range(sum(sizes))) for _ in range(6)]
    assert len(set(epochs)) > 1
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_batches_keep_to_the_token_budget(targets):
    batches = [next(iterator) for iterator in [iter(stream(targets))] for _ in range(10)]
    assert all(batch.input_ids.numel() <= 64 for batch in batches)
    assert max(len(batch.input_ids) for batch in batches) > 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_at_any_batch_on_another_number_of_ranks_gives_exactly_the_rest(targets, world_size):
    whole = epoch_of(stream(targets))
    for stopped_at, then in itertools.product((0, 1, 3, len(whole) // world_size - 1), (1, 2, 3)):
        before = stream(targets, world_size=world_size)
        for _ in itertools.islice(before, stopped_at):
            pass
        state = before.state_dict()
        resumed = []
        for rank in range(then):
            source = stream(targets, rank=rank, world_size=then)
            source.load_state_dict(state)
            left = -(-(len(whole) - state["consumed"]) // then)
            resumed.append([numbers_in(batch) for batch in itertools.islice(source, left)])
            assert (source.state_dict()["epoch"], source.state_dict()["consumed"]) == (1, 0)
        assert in_global_order(resumed) == whole[state["consumed"] :]


def test_the_state_after_an_epoch_goes_on_with_the_next(targets):
    source = stream(targets)
    epoch_of(source)
    assert source.state_dict() == {
        "manifest": targets[1].digest,
        "split": "train",
        "where": {},
        "seed": 1,
        "batch_tokens": 64,
        "shuffle_buffer": 20,
        "packing": False,
        "epoch": 1,
        "consumed": 0,
    }
    resumed = stream(targets)
    resumed.load_state_dict(source.state_dict())
    resumed.set_epoch(source.state_dict()["epoch"])
    assert sorted(sum(epoch_of(resumed, 1), ())) == list(range(141))
    assert resumed.state_dict()["epoch"] == 2


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_tokens": 32}, {"shuffle_buffer": 7}])
def test_a_state_of_another_order_is_refused(targets, change):
    with pytest.raises(ResumeMismatch, match=next(iter(change))):
        stream(targets, **change).load_state_dict(stream(targets).state_dict())


def test_a_state_of_another_manifest_is_refused(targets):
    other = targets[1].model_copy(update={"seed": 9})
    with pytest.raises(ResumeMismatch, match="manifest") as caught:
        stream((targets[0], other)).load_state_dict(stream(targets).state_dict())
    assert (caught.value.saved, caught.value.current) == (targets[1].digest, other.digest)


class CountingStore(LocalStore):
    """A store that says what was read."""

    def __init__(self, root):
        super().__init__(root)
        self.reads = []

    def read(self, path):
        self.reads.append(path)
        return super().read(path)


def test_parts_are_read_one_at_a_time_as_they_are_needed_and_skipped_when_they_are_behind(targets):
    counting = CountingStore(targets[0].uri)
    source = stream((counting, targets[1]), shuffle_buffer=1)
    epoch_length = source.batches_per_epoch(0)
    iterator = iter(source)
    assert counting.reads == [], "lengths need no whole part"
    next(iterator)
    assert len(counting.reads) == 1
    for _ in range(epoch_length - 1):
        state = source.state_dict()
        next(iterator)
    assert len(counting.reads) == 3, "each part once"
    counting.reads.clear()
    late = stream((counting, targets[1]), shuffle_buffer=1)
    late.load_state_dict(state)
    next(iter(late))
    assert len(counting.reads) == 1


def test_alpha_is_part_of_what_the_batches_are_but_not_of_their_order(targets):
    one, other = stream(targets, alpha=0.5), stream(targets, alpha=0.2)
    assert one.digest != other.digest
    other.load_state_dict(one.state_dict())
    assert epoch_of(one) == epoch_of(other)


def test_a_damaged_part_is_named(tmp_path):
    rng = np.random.default_rng(1)
    store, manifest = write_targets(tmp_path, [[row("a", 6, rng)]])
    path = store.local_path(manifest.parts[0].path)
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(PartCorrupt, match="part-00000"):
        next(iter(stream((store, manifest))))
    path.write_bytes(b"")
    with pytest.raises(PartCorrupt, match="part-00000"):
        stream((store, manifest)).batches_per_epoch(0)
    path.unlink()
    with pytest.raises(PartCorrupt, match="missing"):
        stream((store, manifest)).batches_per_epoch(0)


def test_a_part_with_other_sketch_settings_or_another_number_of_rows_is_refused(tmp_path):
    rng = np.random.default_rng(1)
    store, manifest = write_targets(tmp_path, [[row("a", 6, rng)]])
    content = encode_part([row("b", 6, rng)], fold=0, metadata=metadata(tau=1 / 4))
    store.put_once("data/train/other.parquet", content)
    other = receipt("1" * 32, "data/train/other.parquet", content, num_sequences=1)
    with pytest.raises(PartCorrupt, match="tau"):
        stream((store, manifest_of([*manifest.parts, other]))).batches_per_epoch(0)
    short = other.model_copy(update={"num_sequences": 2})
    with pytest.raises(PartCorrupt, match="names 2"):
        stream((store, manifest_of([short]))).batches_per_epoch(0)


def test_each_epoch_takes_the_next_draw_and_the_first_again_after_the_last(tmp_path):
    rng = np.random.default_rng(6)
    tokens = sequence("a", rng.integers(VOCAB, size=40))
    distributions = random_distributions(rng, tokens.num_labels, spread=1.0)
    drawn = [sketch(distributions, tokens.labels, kind="threshold", rng=rng) for _ in range(2)]
    content = encode_part([(tokens, in_draws(drawn))], fold=0, metadata=metadata(draws=2))
    store = LocalStore(tmp_path)
    store.put_once("data/train/part.parquet", content)
    manifest = manifest_of([receipt("0" * 32, "data/train/part.parquet", content, num_sequences=1)])
    batches = itertools.islice(endless(stream((store, manifest), alpha=0.0)), 3)
    counts = [np.diff(batch.entry_offsets.numpy()).tolist() for batch in batches]
    expected = [(one.head_count + one.tail_count).tolist() for one in drawn]
    assert expected[0] != expected[1]
    assert counts == [expected[0], expected[1], expected[0]]


def test_a_split_without_sequences_is_refused(targets):
    with pytest.raises(CorpusEmpty, match="test split"):
        stream(targets, split="test")


def test_a_rank_outside_the_world_is_refused(targets):
    with pytest.raises(ValueError, match="rank is 2"):
        stream(targets, rank=2, world_size=2)


def texts(count, *, name="text"):
    rng = np.random.default_rng(5)
    return [sequence(f"{name} {n}", [n, 0, *rng.integers(50, size=rng.integers(2, 9))]) for n in range(count)]


def first_tokens(batch):
    return tuple(batch.input_ids[:, 0].tolist())


def test_text_batches_give_each_sequence_once_an_epoch_and_resume_anywhere():
    source = TextBatches(texts(30), seed=0, batch_tokens=40, name="style")
    iterator = endless(source)
    first = [first_tokens(next(iterator)) for _ in range(source.batches_per_epoch(0))]
    states = [source.state_dict()]
    second = []
    for _ in range(source.batches_per_epoch(1)):
        second.append(first_tokens(next(iterator)))
        states.append(source.state_dict())
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(30))
    assert first != second
    for done, state in enumerate(states):
        resumed = TextBatches(texts(30), seed=0, batch_tokens=40, name="style")
        resumed.load_state_dict(state)
        assert [first_tokens(batch) for batch in itertools.islice(resumed, len(second) - done)] == second[done:]


def test_text_batches_are_named_by_their_sequences_and_purpose():
    one = TextBatches(texts(5), seed=0, batch_tokens=40, name="style")
    assert one.digest != TextBatches(texts(4), seed=0, batch_tokens=40, name="style").digest
    assert one.digest != TextBatches(texts(5), seed=0, batch_tokens=40, name="retention").digest
    with pytest.raises(ResumeMismatch):
        one.load_state_dict(TextBatches(texts(4), seed=0, batch_tokens=40, name="style").state_dict())


def test_text_batches_of_nothing_are_refused():
    with pytest.raises(CorpusEmpty):
        TextBatches([], seed=0, batch_tokens=40, name="style")


def test_batches_of_a_token_budget_worked_out_by_hand():
    # 3 and 3 make 6; with 5, three times 5 is over 10; 12 is over the budget, so alone; 1 and 2 make 4.
    bounds = batch_bounds(np.array([3, 3, 5, 12, 1, 2]), batch_tokens=10)
    assert bounds.tolist() == [0, 2, 3, 4, 6]
    assert batch_bounds(np.array([], dtype=np.int64), batch_tokens=10).tolist() == [0]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_shuffle_buffer_holds_at_most_its_size_and_loses_nothing(size):
    arrivals = np.arange(60)
    out = through_buffer(arrivals, size=size, generator=keyed_generator("test", 1)).tolist()
    assert sorted(out) == arrivals.tolist()
    assert all(row < place + size for place, row in enumerate(out))
    assert (out == arrivals.tolist()) == (size == 1)


def test_seeds_hang_on_every_part_of_their_key():
    seeds = {keyed_seed("a", 1), keyed_seed("a", 2), keyed_seed("b", 1), keyed_seed("a", "1"), keyed_seed("a1")}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.Generator().manual_seed(max(seeds)) is not None
