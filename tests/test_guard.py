"""Groups are weighed towards given shares, no author is more than the cap without consent, and the card says it all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from softshard import weight_of_step
from softshard.cli import main
from softshard.decoder import Decoder
from softshard.errors import AuthorDominates, BalanceImpossible
from softshard.jobfile import load_job
from softshard.models import load_model
from softshard.run.feed import check_authors, open_feed
from softshard.run.job import STAGES, run_job
from softshard.run.workspace import open_workspace
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter
from softshard.train.filters import RowFilter
from softshard.train.groups import balanced
from softshard.train.objective import CROSS_ENTROPY


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the finished output, and the job file of it with other settings of its training and of its source."""
    shutil.copytree(finished, tmp_path / "out")

    def write(*, consent=(), **train):
        job = yaml.safe_load((finished / "job.yaml").read_text())
        job["out"] = str(tmp_path / "out")
        job["train"] |= {"baseline": None, "retention": None, **train}
        job["corpus"]["sources"][0]["consent"] = list(consent)
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return write


def train(path):
    return run_job(load_job(path), SilentReporter(), stages=STAGES[:4]).trained.adapter


def labels_by_author(finished):
    store = LocalStore(finished / "targets")
    counts = Counter()
    for part in read_manifest(store).of_split("train"):
        for (sequence, _), _ in read_rows(store, part):
            counts[sequence.group] += sequence.num_labels
    return counts


def feed_of(path):
    job = load_job(path)
    workspace = open_workspace(job)
    return job, workspace, open_feed(workspace, read_manifest(workspace.targets))


def test_a_weight_is_the_wanted_share_over_the_share_unless_it_is_clipped():
    balance = balanced({"a": 90, "b": 10}, column="group", shares={"b": 0.5}, clip=(0.25, 4))
    a, b = balance.groups
    assert (a.weight, a.clipped) == (pytest.approx(0.5 / 0.9), False)
    assert (b.weight, b.clipped) == (4, True)
    assert b.share_after == pytest.approx(40 / (40 + 50))
    wide = balanced({"a": 90, "b": 10}, column="group", shares={"b": 0.5}, clip=(0.1, 10))
    assert [one.share_after for one in wide.groups] == pytest.approx([0.5, 0.5])


def test_groups_without_a_share_have_the_rest_by_their_size():
    balance = balanced({"a": 60, "b": 30, "c": 10}, column="style", shares={"a": 0.2}, clip=(0.01, 100))
    assert [one.share_after for one in balance.groups] == pytest.approx([0.2, 0.6, 0.2])


@pytest.mark.parametrize(("shares", "problem"), [({"z": 0.5}, "'z'"), ({"a": 0.3, "b": 0.3}, "sum to 0.6")])
def test_shares_that_no_weights_give_are_refused(shares, problem):
    with pytest.raises(BalanceImpossible, match=problem):
        balanced({"a": 60, "b": 40}, column="group", shares=shares, clip=(0.25, 4))


def test_the_loss_has_the_shares_that_were_asked_for(changed, finished):
    """The weights of an author's labels, summed as the train stage gets them, over those of all."""
    total = sum(labels_by_author(finished).values())
    wanted = {"author 0": 0.2, "author 1": 0.5, "author 2": 0.3}
    job, workspace, feed = feed_of(changed(balance={"shares": wanted}))
    (whole,) = feed.sets
    for author, share in wanted.items():
        targets = replace(whole.targets, where=RowFilter(group=(author,)))
        only = replace(feed, sets=(replace(whole, targets=targets),))
        batches = only.dataset(workspace, alpha=0.5, optimizer=job.train.optimizer)
        weight = sum(float(batch.position_weights.sum()) for batch in batches)
        assert weight / total == pytest.approx(share, rel=1e-5)


def test_a_batch_of_one_group_alone_keeps_the_weight_of_its_group(changed, finished, tiny_model):
    """The loss is a mean over labels, and a weight that all labels of a batch share must not cancel in it."""
    wanted = {"author 0": 0.2, "author 1": 0.5, "author 2": 0.3}
    job, workspace, feed = feed_of(changed(balance={"shares": wanted}))
    decoder = Decoder.of(load_model(tiny_model, dtype=torch.float32, device="cpu"))
    (whole,) = feed.sets
    counts = labels_by_author(finished)
    sizes = {"num_valid": whole.targets.manifest.vocab_size, "chunk_positions": 64}
    for author, share in wanted.items():
        own = replace(whole, targets=replace(whole.targets, where=RowFilter(group=(author,))))
        data = replace(feed, sets=(own,)).dataset(workspace, alpha=0.5, optimizer=job.train.optimizer)
        batch = next(iter(data))
        plain = replace(batch, position_weights=torch.ones_like(batch.position_weights), counted=None)
        ratio = CROSS_ENTROPY.loss(decoder, batch, **sizes) / CROSS_ENTROPY.loss(decoder, plain, **sizes)
        assert float(ratio) == pytest.approx(share * sum(counts.values()) / counts[author], rel=1e-5)
        assert float(weight_of_step(batch.features())) == len(batch.labels)


def test_the_card_has_the_groups_the_rights_and_what_was_measured(changed, finished):
    path = changed(balance={"shares": {"author 1": 0.9}, "clip": [0.5, 1.5]}, author_cap=0.75)
    receipt = train(path)
    folder = path.parent / "out" / "adapter" / receipt.folder
    card = json.loads((folder / "card.json").read_text())
    counts = labels_by_author(finished)
    groups = {one["group"]: one for one in card["balance"]["groups"]}
    assert groups["author 1"]["clipped"]
    assert groups["author 1"]["weight"] == 1.5
    assert groups["author 1"]["share_before"] == pytest.approx(counts["author 1"] / sum(counts.values()))
    assert card["author_shares"] == pytest.approx(
        {name: n / sum(counts.values()) for name, n in sorted(counts.items())}
    )
    assert card["author_cap"] == 0.75
    assert card["manifests"] == [receipt.manifest]
    assert card["holdout_nll_nats"] == receipt.holdout_nll_nats
    assert card["sources"][0]["license"] == "CC0-1.0"
    assert card["settings"]["balance"]["clip"] == [0.5, 1.5]
    for name in ("card.json", "README.md"):
        assert receipt.files[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_the_header_of_the_card_is_what_the_hub_reads(finished):
    from huggingface_hub import ModelCard

    receipt = json.loads((finished / "adapter" / "adapter.json").read_text())["adapter"]
    card = ModelCard.load(finished / "adapter" / receipt["folder"] / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.library_name == "peft"
    assert "| tales | literary | CC0-1.0 | owned |" in card.text


def test_the_same_training_writes_the_same_card(changed):
    path = changed(balance={})
    folder = path.parent / "out" / "adapter" / train(path).folder
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    shutil.rmtree(folder)
    train(path)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_an_author_above_the_cap_ends_the_training_with_one_line_that_names_the_share(changed, finished, capsys):
    counts = labels_by_author(finished)
    author, most = counts.most_common(1)[0]
    share = most / sum(counts.values())
    adapters = {file.name for file in (finished / "adapter").iterdir()}
    path = changed(author_cap=share - 0.001, optimizer={"epochs": 2, "batch_tokens": 512})
    assert main(["train", str(path)]) == 3
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "author_cap" in line)
    assert repr(author) in line
    assert f"{share:.1%}" in line
    assert {file.name for file in (path.parent / "out" / "adapter").iterdir()} == adapters
    _, _, feed = feed_of(changed(author_cap=share - 0.001))
    check_authors(feed, cap=share)


def test_writing_under_consent_is_not_counted_and_no_part_is_computed_for_it(changed, finished):
    counts = labels_by_author(finished)
    (first, most), (_, second) = counts.most_common(2)
    path = changed(author_cap=(most - 1) / sum(counts.values()), consent=[first])
    before = read_manifest(LocalStore(finished / "targets")).digest
    if second == most:
        pytest.fail("the material has two authors of one size")
    assert train(path).manifest == before


def test_consent_is_for_one_source_and_needs_a_field_that_names_authors(changed, finished, capsys):
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["corpus"]["sources"][0] |= {"consent": ["author 0"], "group_field": None}
    path = Path(changed())
    path.write_text(yaml.safe_dump(job))
    assert main(["plan", str(path)]) == 2
    assert "group_field" in capsys.readouterr().err


def test_one_author_after_a_filter_is_all_of_what_is_trained_on(changed):
    with pytest.raises(AuthorDominates, match=r"100\.0%"):
        train(changed(where={"group": ["author 2"]}))
