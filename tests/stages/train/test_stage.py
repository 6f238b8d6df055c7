"""What a job file says of the data of its trainings is what they are fed: packing, filters, weights, other targets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.errors import BlendInvalid, ManifestMissing
from softshard.output.workspace import open_workspace
from softshard.records.spool import Spool
from softshard.shard.manifest import Receipt, read_manifest
from softshard.shard.read import read_rows
from softshard.stages.job import run_job
from softshard.stages.train.data import open_training_data
from softshard.stages.train.student import make_student
from softshard.stages.train.trainings import training_specs
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter

TRAIN = ("corpus", "teacher", "targets", "train")


@pytest.fixture(scope="module")
def other(tiny_job, tmp_path_factory):
    """Output of a job that scored the same sequences without a style teacher."""
    folder = tmp_path_factory.mktemp("other")
    job = load_job(tiny_job(folder, name="other", teacher={"folds": 0}))
    run_job(job, SilentReporter(), stages=TRAIN[:3])
    return folder / "out"


def test_another_set_that_trains_on_the_jobs_hold_out_is_refused(tiny_job, changed, tmp_path):
    """The same documents, of which another seed holds out others."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    job = load_job(tiny_job(folder, name="elsewhere", seed=7, teacher={"folds": 0}))
    run_job(job, SilentReporter(), stages=TRAIN[:3])
    path = changed(targets={"others": [{"out": str(folder / "out")}]})
    with pytest.raises(BlendInvalid, match="documents that this job holds out and is measured on"):
        trained(path)


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the finished output, and the job file of it with other settings of its training and no baseline."""
    shutil.copytree(finished, tmp_path / "out")

    def write(name="job.yaml", **train) -> Path:
        job = yaml.safe_load((finished / "job.yaml").read_text())
        job["out"] = str(tmp_path / "out")
        job["train"] |= {"baseline": None, "retention": None, **train}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(job))
        return path

    return write


def fed(path, *, alpha=0.5):
    """Batches of one epoch as the train stage gets them."""
    job = load_job(path)
    workspace = open_workspace(job)
    data = open_training_data(workspace, read_manifest(workspace.targets))
    return list(data.dataset(job.train, alpha=alpha, optimizer=job.train.optimizer, seed=job.seed))


def trained(path):
    return run_job(load_job(path), SilentReporter(), stages=TRAIN).trained.adapter


def train_rows(out):
    store = LocalStore(Path(out) / "targets")
    return [row for part in read_manifest(store).of_split("train") for row, _ in read_rows(store, part)]


def test_each_setting_is_part_of_the_trainings_name_and_changes_what_is_trained(changed, other):
    settings = [
        {},
        {"packing": True},
        {"where": {"group": ["author 1"]}, "author_cap": 1},
        {"label_weights": {"label_logprob": [[-12, 0], [-2, 1]]}},
        {"balance": {"shares": {"author 0": 0.6}}},
        {"targets": {"others": [{"out": str(other)}]}},
        {"targets": {"how": "blend", "others": [{"out": str(other)}]}},
    ]
    receipts = [trained(changed(**one)) for one in settings]
    assert len({receipt.folder for receipt in receipts}) == len(settings)
    assert len({receipt.files["adapter_model.safetensors"] for receipt in receipts}) == len(settings)


def test_packing_makes_one_row_of_all_tokens_of_a_batch(changed):
    batches = fed(changed(packing=True))
    assert all(batch.input_ids.shape == (1, batch.num_tokens) for batch in batches)


def test_a_filter_lets_only_its_author_in(changed, finished):
    wanted = [sequence for sequence, _ in train_rows(finished) if sequence.group == "author 1"]
    batches = fed(changed(where={"group": ["author 1"]}))
    assert 0 < sum(batch.num_tokens for batch in batches) == sum(len(one.token_ids) for one in wanted)


def test_label_weights_follow_the_labels_log_probability(changed, finished):
    expected = sum(
        min(max((logprob + 12) / 10, 0), 1) for _, targets in train_rows(finished) for logprob in targets.label_logprob
    )
    batches = fed(changed(label_weights={"label_logprob": [[-12, 0], [-2, 1]]}))
    assert sum(float(batch.position_weights.sum()) for batch in batches) == pytest.approx(expected, rel=1e-5)


def test_a_mix_takes_its_shares_and_a_blend_each_sequence_once(changed, other, finished):
    tokens = sum(len(sequence.token_ids) for sequence, _ in train_rows(finished))
    mixed = fed(changed(targets={"others": [{"out": str(other), "weight": 3}]}))
    blended = fed(changed(targets={"how": "blend", "others": [{"out": str(other), "weight": 3}]}))
    assert 2 * tokens <= sum(batch.num_tokens for batch in mixed) < 2 * tokens + 512
    assert sum(batch.num_tokens for batch in blended) == tokens


def test_without_weight_of_its_own_a_job_trains_on_the_others_alone(changed, other):
    alone = fed(changed(targets={"own_weight": 0, "others": [{"out": str(other)}]}), alpha=0)
    job = yaml.safe_load((other / "job.yaml").read_text())
    path = changed("theirs.yaml")
    path.write_text(yaml.safe_dump(job))
    theirs = fed(path, alpha=0)
    assert [batch.entry_ids.tolist() for batch in alone] == [batch.entry_ids.tolist() for batch in theirs]


def test_the_weights_of_a_mix_change_along_their_steps(changed, other):
    """All tokens of the first steps are the job's own, all of the last ones the other's."""
    weights = {"own_weight": [[0, 1], [2, 1], [3, 0]], "others": [{"out": str(other), "weight": [[2, 0], [3, 1]]}]}
    path = changed(targets=weights)
    job = load_job(path)
    workspace = open_workspace(job)
    data = open_training_data(workspace, read_manifest(workspace.targets))
    turns = data.dataset(job.train, alpha=0.5, optimizer=job.train.optimizer, seed=job.seed).turns(0)
    assert [turn.source for turn in turns] == [0, 0, 0] + [1] * (len(turns) - 3)


def test_an_older_manifest_of_another_job_can_be_named(changed, other):
    digest = read_manifest(LocalStore(other / "targets")).digest
    assert trained(changed(targets={"others": [{"out": str(other), "manifest": digest}]})).num_steps > 0
    with pytest.raises(ManifestMissing, match="0000"):
        trained(changed(targets={"others": [{"out": str(other), "manifest": "0" * 64}]}))


def test_targets_of_other_temperatures_are_refused(changed, tiny_job, tmp_path):
    (tmp_path / "warm").mkdir()
    target = {"kind": "threshold", "temperature": 2.0}
    warm = tiny_job(tmp_path / "warm", name="warm", teacher={"folds": 0}, target=target)
    run_job(load_job(warm), SilentReporter(), stages=TRAIN[:3])
    with pytest.raises(BlendInvalid, match="temperature 2"):
        trained(changed(targets={"others": [{"out": str(tmp_path / "warm" / "out")}]}))


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"targets": {"others": []}}, "at least 1"),
        ({"targets": {"how": "blend", "others": [{"out": "x", "weight": [[0, 1], [5, 2]]}]}}, "blend cannot change"),
        ({"targets": {"own_weight": 0, "others": [{"out": "x", "weight": 0}]}}, "some set needs a weight"),
        ({"targets": {"others": [{"out": "x", "weight": [[5, 1], [0, 1]]}]}}, "in ascending order"),
        ({"label_weights": {"entropy": [[2, 1], [1, 0]]}}, "in ascending order"),
        ({"where": {"mean_entropy": [3, 1]}}, "no sequence is within"),
        ({"balance": {"shares": {"a": 0.8, "b": 0.4}}}, "sum to 1.2"),
        ({"sweep": {}}, "needs a list of values"),
        ({"sweep": {"retention_weight": [0.1]}}, "needs `retention`"),
        ({"objective": "ce", "sweep": {"alpha": [0.1]}}, "objective: kl"),
        ({"baseline": {"retention_weight": 0.1}}, "baseline.retention_weight needs `retention`"),
        ({"label_weights": {"entropy": [[0, 0], [9, 0]]}}, "leaves no label"),
        ({"targets": {"own_weight": [[0, 0]], "others": [{"out": "x"}]}, "where": {"style": ["a"]}}, "leaves out"),
        ({"targets": {"others": [{"out": "x", "weight": 0}]}}, "weight 0 leaves x out"),
        ({"targets": {"others": [{"out": "x", "weight": [[0, 0], [7, 0]]}]}}, "weight 0 leaves x out"),
    ],
)
def test_settings_that_mean_nothing_are_refused_with_their_line(changed, capsys, train, problem):
    assert main(["plan", str(changed(**train))]) == 2
    said = capsys.readouterr().err
    assert "line " in said
    assert "train" in said
    assert problem in said


def ids(path, manifest=None):
    workspace = open_workspace(load_job(path))
    data = open_training_data(workspace, manifest or read_manifest(workspace.targets))
    specs, _ = training_specs(
        workspace.job.train, data, make_student(workspace), retention_digest=None, seed=workspace.job.seed
    )
    return [spec.training_id for spec in specs]


def test_another_hold_out_gives_another_training_even_where_the_jobs_own_targets_are_left_out(changed, other):
    path = changed(targets={"own_weight": 0, "others": [{"out": str(other)}]})
    whole = read_manifest(LocalStore(path.parent / "out" / "targets"))
    first, *rest = whole.of_split("test")
    smaller = whole.model_copy(update={"parts": Spool(Receipt, [*whole.of_split("train"), *rest])})
    fewer = whole.model_copy(update={"parts": Spool(Receipt, [*whole.of_split("train")[1:], first, *rest])})
    assert ids(path) != ids(path, smaller)
    assert ids(path) == ids(path, fewer)


def test_a_receipt_names_the_targets_that_were_trained_on_and_no_others(changed, other):
    theirs, own = (read_manifest(LocalStore(out / "targets")).digest for out in (other, changed().parent / "out"))
    more = {"others": [{"out": str(other)}]}
    assert trained(changed(targets={**more, "own_weight": 0})).manifests == (theirs,)
    assert trained(changed(targets=more)).manifests == (own, theirs)


@pytest.mark.parametrize("how", ["mix", "blend"])
def test_a_factor_that_all_weights_share_changes_no_id(changed, other, how):
    def with_weights(own, theirs):
        return ids(changed(targets={"how": how, "own_weight": own, "others": [{"out": str(other), "weight": theirs}]}))

    assert with_weights(1, 3) == with_weights(2, 6) == with_weights(0.1, 0.3)
    assert with_weights(1, 3) != with_weights(3, 1)


def test_of_one_set_neither_weight_nor_how_is_part_of_an_id(changed, other):
    def alone(**targets):
        return ids(changed(targets={"own_weight": 0, **targets}))

    one = alone(others=[{"out": str(other)}])
    assert one == alone(how="blend", others=[{"out": str(other), "weight": 5}])
    assert one == alone(others=[{"out": str(other), "weight": [[0, 1], [9, 2]]}])


def test_label_weights_of_a_blend_are_the_sets_mean_for_the_adapter_and_the_baseline(changed, other, finished):
    def weights(out, wanted):
        rows = {sequence.sequence_id: targets.label_logprob for sequence, targets in train_rows(out)}
        return {name: [min(max((one + 12) / 10, 0), 1) for one in rows[name]] for name in wanted}

    names = [sequence.sequence_id for sequence, _ in train_rows(finished)]
    sets = [weights(out, names) for out in (finished, other)]
    expected = sum(sum(a) + 3 * sum(b) for a, b in zip(*(one.values() for one in sets), strict=True)) / 4
    path = changed(
        label_weights={"label_logprob": [[-12, 0], [-2, 1]]},
        targets={"how": "blend", "others": [{"out": str(other), "weight": 3}]},
    )
    for alpha in (0.5, 1.0):
        found = sum(float(batch.position_weights.sum()) for batch in fed(path, alpha=alpha))
        assert found == pytest.approx(expected, rel=1e-5)
    _, own = (sum(map(sum, one.values())) for one in sets)
    assert own != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("where", [{"mean_entropy": [90, 99]}, {"group": ["nobody"]}])
def test_groups_of_nothing_are_named_as_nothing(changed, capsys, where):
    assert main(["train", str(changed(balance={}, where=where))]) == 3
    assert "no sequence of the train split matches the filter" in capsys.readouterr().err


def test_a_blend_of_two_jobs_runs_from_the_command_line(changed, other, capsys):
    path = changed(targets={"how": "blend", "others": [{"out": str(other)}]})
    assert main(["run", "--json", str(path)]) == 0
    values = json.loads(capsys.readouterr().out)
    card = json.loads(Path(values["adapter_folder"], "card.json").read_text())
    assert len(card["manifests"]) == 2
    assert values["adapter"]["human_nll_nats"] > 0
