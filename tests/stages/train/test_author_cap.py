"""Groups are weighed towards given shares, no author is more than the cap without consent, and the card says it all."""

from __future__ import annotations

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
from softshard.config.job_file import load_job
from softshard.corpus.counts import GroupCount
from softshard.corpus.documents import train_groups
from softshard.corpus.manifest import read_corpus_manifest
from softshard.data.filters import RowFilter
from softshard.data.groups import balanced
from softshard.errors import AuthorDominates, BalanceImpossible
from softshard.finetune.objective import CROSS_ENTROPY
from softshard.models import load_model
from softshard.models.decoder import Decoder
from softshard.output.workspace import open_workspace
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.stages import STAGES
from softshard.stages.corpus.stage import StoredCorpus
from softshard.stages.job import run_job
from softshard.stages.train.author_cap import CountedText, check_author_cap, expected_shares
from softshard.stages.train.data import open_training_data
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


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
    return job, workspace, open_training_data(workspace, read_manifest(workspace.targets))


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
    job, _, feed = feed_of(changed(balance={"shares": wanted}))
    (whole,) = feed.sets
    for author, share in wanted.items():
        targets = replace(whole.targets, where=RowFilter(group=(author,)))
        only = replace(feed, sets=(replace(whole, targets=targets),))
        batches = only.dataset(job.train, alpha=0.5, optimizer=job.train.optimizer, seed=job.seed)
        weight = sum(float(batch.position_weights.sum()) for batch in batches)
        assert weight / total == pytest.approx(share, rel=1e-5)


def test_a_batch_of_one_group_alone_keeps_the_weight_of_its_group(changed, finished, tiny_model):
    """The loss is a mean over labels, and a weight that all labels of a batch share must not cancel in it."""
    wanted = {"author 0": 0.2, "author 1": 0.5, "author 2": 0.3}
    job, _, feed = feed_of(changed(balance={"shares": wanted}))
    decoder = Decoder.of(load_model(tiny_model, dtype=torch.float32, device="cpu"))
    (whole,) = feed.sets
    counts = labels_by_author(finished)
    sizes = {"num_valid": whole.targets.manifest.vocab_size, "chunk_positions": 64}
    for author, share in wanted.items():
        own = replace(whole, targets=replace(whole.targets, where=RowFilter(group=(author,))))
        data = replace(feed, sets=(own,)).dataset(job.train, alpha=0.5, optimizer=job.train.optimizer, seed=job.seed)
        batch = next(iter(data))
        ones = torch.ones_like(batch.position_weights)
        plain = replace(batch, targets=replace(batch.targets, position_weights=ones, counted=None))
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
        {name: max(counts[name] / sum(counts.values()), one["share_after"]) for name, one in groups.items()}
    )
    assert card["author_cap"] == 0.75
    assert card["manifests"] == list(receipt.manifests)
    assert card["holdout_nll_nats"] == receipt.holdout_nll_nats
    assert card["sources"][0]["license"] == "CC0-1.0"
    assert card["settings"]["balance"]["clip"] == [0.5, 1.5]


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
    _, workspace, feed = feed_of(changed(author_cap=share))
    check_author_cap(workspace, feed, None)


def test_writing_under_consent_is_not_counted_and_no_part_is_computed_for_it(changed, finished):
    counts = labels_by_author(finished)
    (first, most), (_, second) = counts.most_common(2)
    path = changed(author_cap=(most - 1) / sum(counts.values()), consent=[first])
    before = read_manifest(LocalStore(finished / "targets")).digest
    if second == most:
        pytest.fail("the material has two authors of one size")
    assert train(path).manifests == (before,)


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


def test_weights_of_groups_do_not_lift_an_author_above_the_cap(changed):
    path = changed(balance={"shares": {"author 1": 0.9}, "clip": [0.01, 100]})
    _, workspace, feed = feed_of(path)
    with pytest.raises(AuthorDominates, match=r"'author 1' has 90\.0% of their weight in the loss"):
        check_author_cap(workspace, feed, None)
    with pytest.raises(AuthorDominates, match=r"90\.0% of their weight"):
        run_job(load_job(path), SilentReporter(), stages=STAGES[:2])


def test_weights_of_labels_count_where_they_give_an_author_more_than_the_text_does(changed, finished):
    points = [[-7, 0], [-5, 1]]
    store, text, loss = LocalStore(finished / "targets"), Counter(), Counter()
    for part in read_manifest(store).of_split("train"):
        for (sequence, targets), _ in read_rows(store, part):
            text[sequence.group] += sequence.num_labels
            loss[sequence.group] += sum(min(max((one + 7) / 2, 0), 1) for one in targets.label_logprob)
    expected = {
        author: max(text[author] / sum(text.values()), loss[author] / sum(loss.values())) for author in sorted(text)
    }
    assert expected != {author: text[author] / sum(text.values()) for author in text}
    _, workspace, feed = feed_of(changed(label_weights={"label_logprob": points}))
    assert check_author_cap(workspace, feed, None) == pytest.approx(expected, rel=1e-5)


def test_an_author_named_like_the_source_or_not_at_all_is_an_author_where_a_field_names_them(changed):
    counts = (GroupCount("tales", "literary", "tales", 0, 60), GroupCount("tales", "literary", "", 1, 40))
    path = changed()
    job = yaml.safe_load(path.read_text())
    for field, expected in (("author", {"": 0.4, "tales": 0.6}), (None, {})):
        job["corpus"]["sources"][0]["group_field"] = field
        path.write_text(yaml.safe_dump(job))
        shares = expected_shares(open_workspace(load_job(path)), CountedText(style=counts, retention=()))
        assert {author: one.share for author, one in shares.items()} == pytest.approx(expected)


def test_another_jobs_sources_are_authors_unless_its_own_file_says_that_nobody_is_named(changed, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "theirs")
    job = yaml.safe_load((finished / "job.yaml").read_text())
    path = changed(author_cap=1, targets={"own_weight": 0, "others": [{"out": str(tmp_path / "theirs")}]})

    def counted():
        _, workspace, feed = feed_of(path)
        return set(check_author_cap(workspace, feed, None))

    assert counted() == {"author 0", "author 1", "author 2"}
    job["corpus"]["sources"][0]["group_field"] = None
    (tmp_path / "theirs" / "job.yaml").write_text(yaml.safe_dump(job))
    assert counted() == set()
    (tmp_path / "theirs" / "job.yaml").unlink()
    assert counted() == {"author 0", "author 1", "author 2"}


def test_no_teacher_is_trained_on_an_author_above_the_cap(tiny_job, tmp_path):
    path = tiny_job(tmp_path, train={"author_cap": 0.2})
    with pytest.raises(AuthorDominates, match="of the train tokens"):
        run_job(load_job(path), SilentReporter(), stages=STAGES[:2])
    assert not (tmp_path / "out" / "teacher").exists()


def test_the_plan_tells_what_the_cap_will_say(tiny_job, tmp_path, capsys):
    path = tiny_job(tmp_path, train={"author_cap": 0.2})
    assert main(["plan", str(path), "--tokens-per-second", "1000"]) == 0
    said = capsys.readouterr().out
    assert "authors         3 counted, the largest share is" in said
    assert "before any teacher is trained: train.author_cap: author 'author" in said
    assert max(len(line) for line in said.replace(str(tmp_path), "/some/folder").splitlines()) <= 80
    with pytest.raises(AuthorDominates) as refused:
        run_job(load_job(path), SilentReporter(), stages=STAGES[:2])
    assert main(["plan", "--json", str(path), "--tokens-per-second", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["authors"]["refusal"] == str(refused.value)


def test_what_a_count_of_the_corpus_tells_is_what_its_targets_tell(changed, finished):
    path = changed(balance={"shares": {"author 1": 0.5}}, where={"style": ["literary"]})
    _, workspace, feed = feed_of(path)
    corpus = read_corpus_manifest(LocalStore(finished / "corpus"))
    text = CountedText(style=train_groups(LocalStore(finished / "corpus"), corpus.documents), retention=())
    shares = {author: one.share for author, one in expected_shares(workspace, text).items()}
    assert shares == pytest.approx(check_author_cap(workspace, feed, None), rel=1e-6)


@pytest.mark.parametrize("train", [{"where": {"mean_entropy": [0, 99]}}, {"targets": {"others": [{"out": "none"}]}}])
def test_what_cannot_be_told_before_there_are_targets_is_left_to_the_train_stage(changed, train):
    text = CountedText(style=(GroupCount("tales", "literary", "a", 0, 1),), retention=())
    assert expected_shares(open_workspace(load_job(changed(**train))), text) is None


def test_weights_of_a_mix_beyond_the_last_step_do_not_count(changed, finished):
    def check(points):
        other = {"out": str(finished), "where": {"group": ["author 1"]}, "weight": points}
        _, workspace, feed = feed_of(changed(targets={"others": [other]}))
        return check_author_cap(workspace, feed, None)

    assert max(check([[0, 0], [1000, 0], [1001, 1]]).values()) < 0.5
    for points in ([[0, 1], [1, 0]], [[0, 0], [1, 1]], [[0, 0], [2, 1], [1000, 1], [1001, 0]]):
        with pytest.raises(AuthorDominates, match=r"'author 1' has 6\d"):
            check(points)


def with_retention(finished, objective, **settings):
    job = yaml.safe_load((finished / "job.yaml").read_text())
    return {**job["train"]["retention"], "objective": objective, **settings}


@pytest.mark.parametrize(
    ("weight", "batch_tokens", "share"),
    [(0.1, 512, (50 + 50) / 150), (3.0, 512, (0.5 + 3) / 4), (0.25, 1, (0.5 + 0.25) / 1.25)],
)
def test_retention_text_whose_tokens_are_learnt_counts_for_its_authors(changed, finished, weight, batch_tokens, share):
    """By its part of a step's tokens, or of its loss, whichever gives an author more."""
    retention = with_retention(finished, "ce", weight=weight, batch_tokens=batch_tokens)
    path = changed(retention=retention, optimizer={"batch_tokens": 1024})
    text = CountedText(
        style=(GroupCount("tales", "literary", "a", 0, 50), GroupCount("tales", "literary", "b", 0, 50)),
        retention=(GroupCount("other", "literary", "b", -1, 7),),
    )
    shares = {author: one.share for author, one in expected_shares(open_workspace(load_job(path)), text).items()}
    assert shares == pytest.approx({"a": 0.5, "b": share})


def test_retention_text_whose_tokens_are_not_learnt_does_not_count(changed, finished):
    store = LocalStore(finished / "retention")
    text = StoredCorpus(store=store, manifest=read_corpus_manifest(store))
    _, workspace, feed = feed_of(changed())
    alone = check_author_cap(workspace, feed, None)
    for objective, weight, same in (("kl", 1.0, True), ("ce", 0.0, True), ("ce", 1.0, False)):
        path = changed(retention=with_retention(finished, objective, weight=weight))
        _, workspace, feed = feed_of(path)
        assert (check_author_cap(workspace, feed, text) == alone) == same


def test_the_card_names_the_retention_text_and_who_agreed(changed, finished):
    retention = with_retention(finished, "ce", weight=0.2)
    retention["sources"][0] |= {"consent": ["author 2"]}
    path = changed(consent=["author 1"], retention=retention)
    receipt = train(path)
    folder = path.parent / "out" / "adapter" / receipt.folder
    card = json.loads((folder / "card.json").read_text())
    assert [one["name"] for one in card["retention_sources"]] == ["other"]
    assert card["consent"] == {"tales": ["author 1"], "other": ["author 2"]}
    assert "author 0" in card["author_shares"]
    assert "| other | literary | CC0-1.0 | owned |" in (folder / "README.md").read_text()
    assert [one.name for one in receipt.sources] == ["tales", "other"]


def test_a_card_follows_the_job_and_the_adapter_and_its_receipt_stay_as_they_are(changed):
    def files(receipt):
        folder = path.parent / "out" / "adapter" / receipt.folder
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    path = changed(author_cap=0.7)
    first = files(train(path))
    receipt = train(changed(author_cap=0.8))
    second = files(receipt)
    assert {name for name in first if first[name] != second[name]} == {"README.md", "card.json"}
    assert not {"README.md", "card.json"} & set(receipt.files)
    assert json.loads(second["card.json"])["author_cap"] == 0.8
    (path.parent / "out" / "adapter" / receipt.folder / "README.md").unlink()
    assert files(train(path)) == second


def test_an_author_who_is_brought_to_the_cap_is_not_above_it(changed):
    path = changed(balance={"shares": {"author 0": 0.6}}, author_cap=0.6)
    _, workspace, feed = feed_of(path)
    assert check_author_cap(workspace, feed, None)["author 0"] == pytest.approx(0.6)
