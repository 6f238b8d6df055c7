"""What the library is asked for is refused as the job file refuses it, and what it reads is checked each time."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fakes.targets import VOCAB, metadata, numbered_parts, write_targets
from softshard.cli import main
from softshard.config import LoraSettings, OptimizerSettings
from softshard.data.blend import Blend
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mix import MixWeights, SoftLabelMix
from softshard.data.prefetch import prefetched
from softshard.data.target_set import TargetSet
from softshard.errors import BlendInvalid, PartCorrupt, TargetsUnsuitable
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import fine_tune
from softshard.models import load_model
from softshard.shard.manifest import write_manifest
from softshard.shard.read import PartReader
from softshard.storage import LocalStore

SETTINGS = {"seed": 1, "batch_tokens": 32, "shuffle_buffer": 20, "rank": 0, "world_size": 1, "prefetch": 0}


def targets_in(folder, *, kind="threshold", temperature=1.0, sizes=(6, 6)):
    store, manifest = write_targets(folder, numbered_parts(np.random.default_rng(0), sizes, kind=kind), kind=kind)
    target = {**manifest.target, "temperature": temperature}
    return TargetSet(store=store, manifest=manifest.model_copy(update={"target": target}))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_human_weight_outside_its_range_is_refused(tmp_path, alpha):
    with pytest.raises(ValueError, match="alpha"):
        SoftLabelDataset(targets_in(tmp_path), alpha=alpha, **SETTINGS)


@pytest.mark.parametrize(("kind", "truncated"), [("threshold", "ghost"), ("topk", "ghost"), ("nucleus", "renormalise")])
def test_a_temperature_that_is_not_exact_is_refused(tmp_path, kind, truncated):
    settings = {**SETTINGS, "alpha": 0.5, "truncated": truncated, "temperature": 2.0}
    with pytest.raises(TargetsUnsuitable, match=f"kind {kind}"):
        SoftLabelDataset(targets_in(tmp_path, kind=kind), **settings)


@pytest.mark.parametrize(("kind", "truncated"), [("full", "ghost"), ("topk", "renormalise")])
def test_a_temperature_that_is_exact_is_taken(tmp_path, kind, truncated):
    settings = {**SETTINGS, "alpha": 0.5, "truncated": truncated, "temperature": 2.0}
    assert len(SoftLabelDataset(targets_in(tmp_path, kind=kind), **settings)) > 0


def test_a_mix_of_two_temperatures_is_refused(tmp_path):
    sets = [targets_in(tmp_path / str(t), temperature=t) for t in (1.0, 2.0)]
    with pytest.raises(BlendInvalid, match="temperature"):
        len(SoftLabelMix([SoftLabelDataset(one, alpha=0.5, **SETTINGS) for one in sets], MixWeights.constant(1, 1)))
    # With alpha 1 nothing of the targets is loaded.
    assert len(SoftLabelMix([SoftLabelDataset(one, alpha=1, **SETTINGS) for one in sets], MixWeights.constant(1, 1)))


def test_a_blend_of_two_temperatures_is_refused(tmp_path):
    sets = tuple(targets_in(tmp_path / str(t), temperature=t) for t in (1.0, 2.0))
    with pytest.raises(BlendInvalid, match="temperature"):
        len(SoftLabelDataset(Blend(sets=sets, weights=(1, 1)), alpha=0.5, **SETTINGS))


def test_a_second_call_with_the_same_data_goes_on_from_the_checkpoint(tiny_model, tmp_path):
    data = SoftLabelDataset(targets_in(tmp_path / "targets"), alpha=0.5, **SETTINGS)
    seen = []

    def stop(step):
        seen.append(step.step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def train(on_step):
        return fine_tune(
            load_model(tiny_model, dtype=torch.float32, device="cpu"),
            data,
            lora=LoraSettings(rank=2),
            optimizer=OptimizerSettings(epochs=2, checkpoint_steps=100),
            retention=None,
            seed=0,
            num_valid=VOCAB,
            chunk_positions=64,
            checkpoint=Checkpoint(store=LocalStore(tmp_path / "kept"), path="one.pt"),
            identity="one",
            on_step=on_step,
        )

    with pytest.raises(KeyboardInterrupt):
        train(stop)
    tuned = train(lambda step: seen.append(step.step))
    assert seen == [step.step for step in tuned.log]


def damaged(column, value):
    """A part in which the first entry of a list column is another number."""
    from softshard.shard.encode import encode_part

    content = encode_part(numbered_parts(np.random.default_rng(0), (4,))[0], fold=0, metadata=metadata())
    table = pq.read_table(pa.BufferReader(content))
    lists = table[column].to_pylist()
    next(row for row in lists if row)[0] = value
    place = table.schema.get_field_index(column)
    table = table.set_column(place, table.schema.field(column), pa.array(lists, table.schema.field(column).type))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("column", "value"), [("token_ids", VOCAB), ("token_ids", -1), ("head_ranks", -1)])
def test_a_token_outside_the_vocabulary_is_found_by_whoever_reads_the_row_group(column, value):
    reader = PartReader(damaged(column, value), uri="part")
    with pytest.raises(PartCorrupt, match="outside the vocabulary"):
        list(reader.blocks(0))


def test_a_part_that_changes_between_epochs_is_found(tmp_path):
    targets = targets_in(tmp_path, sizes=(6,))
    data = SoftLabelDataset(targets, alpha=0.5, **SETTINGS)
    list(data)
    path = tmp_path / targets.manifest.parts[0].path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(PartCorrupt, match="sha256"):
        list(data)


def test_leaving_does_not_wait_for_a_store_that_does_not_answer():
    answer = threading.Event()

    def slow():
        yield 1
        answer.wait(30)
        yield 2

    items = prefetched(slow(), ahead=2)
    assert next(items) == 1
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 10
    answer.set()


def test_whatever_ends_the_thread_that_works_ahead_reaches_whoever_takes_its_items():
    def leaving():
        yield 1
        raise SystemExit(4)

    items = prefetched(leaving(), ahead=2)
    assert next(items) == 1
    with pytest.raises(SystemExit):
        next(items)


def test_iterating_changes_nothing_of_the_process(tmp_path, monkeypatch):
    """The size of the block by which glibc is told to keep memory is allocated by the command line alone."""
    data = SoftLabelDataset(targets_in(tmp_path), alpha=0.5, **SETTINGS)
    sizes, empty = [], np.empty

    def noted(shape, *arguments, **settings):
        sizes.append(int(np.prod(shape)))
        return empty(shape, *arguments, **settings)

    monkeypatch.setattr(np, "empty", noted)
    list(data)
    assert max(sizes, default=0) < 2**20


def blend_outs(folder, **first):
    outs = []
    for name, settings in (("one", first), ("two", {})):
        targets = targets_in(folder / name / "targets", **{"kind": "topk", **settings})
        write_manifest(targets.store, targets.manifest)
        outs.append(folder / name)
    return [str(out) for out in outs]


def test_the_blend_command_says_that_ghosts_must_be_renormalised(tmp_path, capsys):
    assert main(["blend", "--json", *blend_outs(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["can_blend"]
    assert "truncated: renormalise" in values["needs"]


def test_the_blend_command_says_that_temperatures_differ(tmp_path, capsys):
    outs = blend_outs(tmp_path, temperature=2.0)
    assert main(["blend", *outs]) == 0
    assert "neither mix nor blend" in capsys.readouterr().out
    assert main(["blend", "--json", *outs]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["can_mix"], values["can_blend"]) == (False, False)


def test_the_blend_command_ends_with_3_on_a_damaged_part(tmp_path, capsys):
    outs = blend_outs(tmp_path)
    part = next((tmp_path / "two" / "targets" / "data").rglob("*.parquet"))
    content = bytearray(part.read_bytes())
    content[4:400] = bytes(396)
    part.chmod(0o644)
    part.write_bytes(content)
    assert main(["blend", *outs]) == 3
    assert part.name in capsys.readouterr().err


def test_the_blend_command_ends_with_3_on_no_rows(tmp_path, capsys):
    outs = blend_outs(tmp_path)
    targets = targets_in(tmp_path / "none" / "targets", kind="topk", sizes=(0,))
    write_manifest(targets.store, targets.manifest)
    assert main(["blend", outs[0], str(tmp_path / "none")]) == 3
    assert "train" in capsys.readouterr().err
