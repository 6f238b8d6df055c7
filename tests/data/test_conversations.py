"""Target sets of version 2, with context between labels: what readers and trainers make of them."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset

from fakes.students import student
from fakes.targets import VOCAB, conversations, manifest_of, metadata, receipt, row, write_targets
from softshard.cli import main
from softshard.data.blend import Blend
from softshard.data.dataset import SoftLabelDataset
from softshard.data.filters import RowFilter
from softshard.data.mix import MixWeights, SoftLabelMix
from softshard.data.target_set import TargetSet
from softshard.errors import PartCorrupt
from softshard.integrations.axolotl import axolotl_rows
from softshard.integrations.causal_lm import accept_targets
from softshard.integrations.rows import SoftLabelCollator, target_rows
from softshard.shard.encode import encode_part
from softshard.shard.manifest import write_manifest

PAGE = Path(__file__).parents[2] / "docs/format.md"
ALPHA = 0.25
ORDER = {"seed": 1, "batch_tokens": 48, "shuffle_buffer": 8, "alpha": ALPHA, "rank": 0, "world_size": 1, "prefetch": 0}


def target_set(folder, rows, *, kind="threshold"):
    store, manifest = write_targets(folder, [rows[:5], rows[5:]], kind=kind)
    write_manifest(store, manifest)
    return TargetSet(store=store, manifest=manifest)


@pytest.fixture(scope="module")
def rows():
    return conversations(np.random.default_rng(0), 12)


@pytest.fixture(scope="module")
def targets(rows, tmp_path_factory):
    return target_set(tmp_path_factory.mktemp("set") / "targets", rows)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return target_set(
        tmp_path_factory.mktemp("set"), conversations(np.random.default_rng(1), 12, kind="topk"), kind="topk"
    )


@pytest.fixture(scope="module")
def dense(targets):
    """For each sequence its tokens, and [V] targets with the label mixed in by the index of the label: by the ten lines
    of the page and a loop over the runs."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    scope, found = {}, {}
    exec(code, scope)
    for part in targets.manifest.parts:
        path = targets.store.local_path(part.path)
        labels = scope["targets"](path)
        for values in pl.read_parquet(path).iter_rows(named=True):
            mixed, place = {}, 0
            for turn, length in enumerate(values["label_runs"]):
                for index in range(place, place + length) if turn % 2 else ():
                    _, label, ids, weights = next(labels)
                    p = np.bincount(ids, (1 - ALPHA) * weights, minlength=VOCAB)
                    p[label] += ALPHA
                    mixed[index] = p
                place += length
            found[tuple(values["token_ids"])] = mixed
    return found


def sequences_in(batch):
    """Tokens of each sequence of a batch, and where they begin among the flat positions."""
    if batch.cu_seq_lens is not None:
        bounds = batch.cu_seq_lens.tolist()
        return [(tuple(batch.input_ids[0, a:b].tolist()), a) for a, b in itertools.pairwise(bounds)]
    width, lengths = batch.input_ids.shape[1], batch.attention_mask.sum(1).tolist()
    return [
        (tuple(ids[:n].tolist()), at * width) for at, (ids, n) in enumerate(zip(batch.input_ids, lengths, strict=True))
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_exactly_the_labels_and_the_loss_is_the_dense_one_over_them(targets, dense, packing):
    model = student()
    reference = student().double()
    accept_targets(model, vocab_size=VOCAB)
    data, seen = SoftLabelDataset(targets, packing=packing, **ORDER), []
    for batch in data:
        positions, expected, losses = [], [], []
        for tokens, start in sequences_in(batch):
            seen.append(tokens)
            with torch.no_grad():
                logits = reference(input_ids=torch.tensor([tokens])).logits[0, :, :VOCAB]
            logp = torch.log_softmax(logits, -1).numpy()
            for index, p in dense[tokens].items():
                positions.append(start + index - 1)
                expected.append(p)
                losses.append(-(p * logp[index - 1]).sum())
        assert batch.positions.tolist() == positions
        label = np.repeat(np.arange(len(positions)), batch.entry_offsets.diff().numpy())
        stored = np.zeros((len(positions), VOCAB))
        np.add.at(stored, (label, batch.entry_ids.numpy()), batch.entry_weights.numpy())
        np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-6)
        loss = float(model(**batch.features()).loss.detach())
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert sorted(seen) == sorted(dense)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_collate_to_what_the_data_set_gives(targets, packing):
    data = SoftLabelDataset(targets, packing=packing, **ORDER)
    columns = Dataset.from_generator(target_rows, gen_kwargs={"targets": targets, "alpha": ALPHA})
    assert "label_runs" in columns.column_names
    assert "first_label" not in columns.column_names
    order = data.epoch_order(0)
    for number, batch in enumerate(data):
        features = SoftLabelCollator(packing=packing)([columns[index] for index in order.rows_in([number])])
        for name, item in batch.features().items():
            assert torch.equal(torch.as_tensor(features[name]), torch.as_tensor(item)), name


def test_rows_say_which_tokens_are_labels_as_the_part_does(targets, rows):
    stored = [
        runs
        for part in targets.manifest.parts
        for runs in pl.read_parquet(targets.store.local_path(part.path))["label_runs"].to_list()
    ]
    assert [given["label_runs"].tolist() for given in target_rows(targets, alpha=0.5)] == stored
    assert any(len(runs) % 2 for runs in stored), "some end with context"


def test_rows_of_both_versions_are_batched_together(targets, tmp_path):
    plain = target_set(tmp_path, [row("a", 6, np.random.default_rng(3), first_label=2) for _ in range(6)])
    both = [next(target_rows(plain, alpha=0.5)), next(target_rows(targets, alpha=0.5))]
    alone = [SoftLabelCollator(packing=True)([given]) for given in both]
    together = SoftLabelCollator(packing=True)(both)
    expected = torch.cat([alone[0]["positions"], 6 + alone[1]["positions"]])
    assert together["positions"].tolist() == expected.tolist()
    filled = [{**both[0], "label_runs": None}, {**both[1], "first_label": None}]
    assert torch.equal(SoftLabelCollator(packing=True)(filled)["positions"], expected), "as concatenated data sets are"


def test_axolotl_gets_a_target_before_each_label_and_none_elsewhere(heads):
    for given, asked in zip(axolotl_rows(heads), target_rows(heads, alpha=0.0), strict=True):
        mask = [turn % 2 == 1 for turn, length in enumerate(asked["label_runs"]) for _ in range(length)]
        ids = given["input_ids"]
        assert given["labels"] == [token if is_label else -100 for token, is_label in zip(ids, mask, strict=True)]
        assert [any(own) for own in given["target_mask"]] == [*mask[1:], False]


def test_filters_mixes_and_blends_read_them(targets, rows, dense, tmp_path):
    wanted = replace(targets, where=RowFilter(mean_entropy=(2.0, 2.6)))
    chosen = list(SoftLabelDataset(wanted, **ORDER))
    means = {tuple(tokens.token_ids.tolist()): float(own.entropy.mean()) for tokens, own in rows}
    found = [means[tokens] for batch in chosen for tokens, _ in sequences_in(batch)]
    assert 0 < len(found) < len(rows)
    assert all(1.9 < mean < 2.7 for mean in found)
    plain = target_set(tmp_path, [row(f"p{n}", 9, np.random.default_rng(n)) for n in range(6)])
    sets = [SoftLabelDataset(one, **ORDER) for one in (targets, plain)]
    mixed = list(SoftLabelMix(sets, MixWeights.constant(0.5, 0.5), rank=0, world_size=1, prefetch=0))
    assert {9} < {len(tokens) for batch in mixed for tokens, _ in sequences_in(batch)}
    blend = SoftLabelDataset(Blend(sets=(targets, targets), weights=(1, 3)), **ORDER)
    positions = {tokens: tuple(index - 1 for index in mixed) for tokens, mixed in dense.items()}
    for batch in blend:
        expected = [start + place for tokens, start in sequences_in(batch) for place in positions[tokens]]
        assert batch.positions.tolist() == expected


def test_blend_counts_their_tokens(targets, rows, capsys):
    out = targets.store.local_path("").parent
    assert main(["blend", "--json", str(out), str(out)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [one["num_tokens"] for one in values["sets"]] == [sum(len(tokens.token_ids) for tokens, _ in rows)] * 2
    assert values["can_blend"] is True


def test_parts_of_two_versions_in_one_set_are_refused(tmp_path):
    store, manifest = write_targets(tmp_path, [[row("a", 6, np.random.default_rng(0))]])
    content = encode_part([row("b", 6, np.random.default_rng(1))], fold=0, metadata=metadata(version=2))
    store.put_once("data/train/other.parquet", content)
    other = receipt("1" * 32, "data/train/other.parquet", content, num_sequences=1)
    both = manifest_of([*manifest.parts, other])
    with pytest.raises(PartCorrupt, match="has schema_version 2, the other parts have 1"):
        list(SoftLabelDataset(TargetSet(store=store, manifest=both), **ORDER))
