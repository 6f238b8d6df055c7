"""The pilot: a table that a real part agrees with, and a tau that keeps the budget it was asked for."""

import json
import math
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from softshard.cli import main
from softshard.cluster import cluster as cluster_module
from softshard.cluster.task_queue import Execution
from softshard.config import (
    FullSketch,
    LoraSettings,
    NucleusSketch,
    TeacherSettings,
    ThresholdSketch,
    TopkSketch,
)
from softshard.config.job_file import load_job
from softshard.corpus.manifest import read_corpus_manifest
from softshard.corpus.read import iter_sequences
from softshard.finetune.adapters.lora import attach_lora, save_adapter
from softshard.models import load_model, load_tokenizer
from softshard.pilot.measure import Extent, Pilot, measure, run_pilot
from softshard.pilot.search import LARGEST_N, SMALLEST_N, ThresholdSearch
from softshard.shard.commit import PartSpec, build_part
from softshard.shard.decode import open_part
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.shard.verify import verify_targets
from softshard.sketch.types import TokenSequence
from softshard.stages.job import run_job
from softshard.stages.targets.threshold import score_pilot
from softshard.storage import LocalStore
from softshard.teacher.transformers_engine import TransformersTeacher, engine_identity
from softshard.telemetry import SilentReporter

VOCAB = 300
STAGES = ("corpus", "teacher", "targets")


def some_sequences(count, *, length=30):
    generator = np.random.default_rng(3)
    return [
        TokenSequence(
            sequence_id=f"{index:032d}",
            document_id=f"{index:032d}",
            source="s",
            style="s",
            group="g",
            start=0,
            token_ids=generator.integers(0, VOCAB, length + index % 7).astype(np.int32),
            label_spans=((1, length + index % 7),),
        )
        for index in range(count)
    ]


def engine(model, *, adapters=()):
    settings = TeacherSettings(model="m", device="cpu", batch_tokens=128)
    identity = engine_identity(settings, context_tokens=512, weights="w", adapters=[])
    return TransformersTeacher(model, adapters=adapters, identity=identity, device="cpu", vocab_size=VOCAB)


LADDER = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def a_plan(model, sketch):
    tokenizer = load_tokenizer(model)
    return PartSpec(
        index=0,
        split="train",
        fold=0,
        slice="a" * 64,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        teacher={"engine": "transformers"},
        sketch=sketch,
        seed=4,
    )


def extent_of(sequences):
    return Extent(num_parts=1, num_labels=sum(sequence.num_labels for sequence in sequences))


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    folders = []
    for seed in range(2):
        model = attach_lora(load_model(tiny_model, dtype=torch.float32, device="cpu"), LoraSettings(rank=2), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        folders.append(tmp_path_factory.mktemp(f"adapter-{seed}"))
        for name, content in save_adapter(model).items():
            (folders[-1] / name).write_bytes(content)
    return folders


SETTINGS = [
    ThresholdSketch(tau=1 / 9),
    ThresholdSketch(tau=1 / 20, draws=3, temperature=1.5),
    TopkSketch(kind="topk", k=7, temperature=1.5),
    NucleusSketch(kind="nucleus", mass=0.8),
    FullSketch(kind="full", temperature=0.7),
]


@pytest.mark.parametrize("adapted", [False, True])
def test_each_of_several_settings_gets_what_it_gets_alone(tiny_model, adapters, adapted):
    teacher, sequences = engine(tiny_model, adapters=adapters if adapted else ()), some_sequences(6)
    together = teacher.score_each(sequences, sketches=SETTINGS, seed=1)
    for sketch, (targets, fidelity) in zip(SETTINGS, together, strict=True):
        alone, expected = teacher.score(sequences, sketch=sketch, seed=1)
        assert fidelity == expected
        for one, other in zip(targets, alone, strict=True):
            for name in one.__slots__:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_several_settings_take_one_pass_of_the_model(tiny_model, monkeypatch):
    teacher, sequences = engine(tiny_model), some_sequences(6)
    passes = Counter()
    monkeypatch.setattr(teacher._model, "forward", counting(passes, "model", teacher._model.forward))
    body = teacher._model.get_decoder()
    monkeypatch.setattr(body, "forward", counting(passes, "body", body.forward))

    def passes_of(sketches):
        passes.clear()
        teacher.score_each(sequences, sketches=sketches, seed=1)
        return dict(passes)

    assert passes_of(SETTINGS) == passes_of(SETTINGS[:1]) != {}


def counting(counter, name, function):
    def counted(*arguments, **options):
        counter[name] += 1
        return function(*arguments, **options)

    return counted


def test_the_table_says_of_a_part_what_the_part_says_of_itself(tiny_model):
    sequences, teacher = some_sequences(12), engine(tiny_model)
    own = ThresholdSketch(tau=1 / 20, draws=2)
    pilot = run_pilot(
        teacher, sequences, spec=a_plan(tiny_model, own), extent=extent_of(sequences), reporter=SilentReporter()
    )
    assert pilot.chosen == own
    assert [row.sketch.tau for row in pilot.rows if row.sketch.kind == "threshold"] == sorted(
        [1 / 20, *(1 / n for n in LADDER)], reverse=True
    )
    for row in pilot.rows:
        plan = a_plan(tiny_model, row.sketch)
        targets, sums = teacher.score(sequences, sketch=row.sketch, seed=plan.seed)
        content, _ = build_part(plan, list(zip(sequences, targets, strict=True)), sums)
        _, metadata = open_part(content, uri="part")
        assert row.num_bytes == len(content)
        assert row.bytes_per_position == pytest.approx(len(content) / sums.num_labels)
        assert row.mean_entries == metadata.fidelity.mean_entries
        assert row.mean_squared_error == metadata.fidelity.mean_squared_error
        assert row.gradient_angle_degrees == metadata.fidelity.gradient_angle_degrees
        mass = np.mean([np.exp(t.head_logprobs).sum() / t.num_labels for t in targets])
        if row.sketch.kind != "threshold":
            assert row.mean_mass_left_out == pytest.approx(1 - mass, abs=0.02)


@pytest.mark.parametrize(("every", "num_parts"), [(2, 1), (4, 1), (8, 1), (2, 8), (4, 8)])
def test_what_a_part_takes_however_small_is_counted_once_a_part(tiny_model, every, num_parts):
    """Of a run of tiny parts, which are mostly that, bytes over positions of the pilot's own part would be far off."""
    sequences, teacher = some_sequences(96), engine(tiny_model)
    plan = a_plan(tiny_model, ThresholdSketch(tau=1 / 12))

    def built(part):
        targets, sums = teacher.score(part, sketch=plan.sketch, seed=plan.seed)
        return len(build_part(plan, list(zip(part, targets, strict=True)), sums)[0])

    pilot, extent = sequences[::every], Extent(num_parts=num_parts, num_labels=extent_of(sequences).num_labels)
    (row,) = measure(teacher, pilot, sketches=[plan.sketch], spec=plan, extent=extent, reporter=SilentReporter())
    real = sum(built(sequences[first::num_parts]) for first in range(num_parts))
    quotient = built(pilot) / extent_of(pilot).num_labels * extent.num_labels
    assert abs(quotient - real) > 0.1 * real
    assert abs(row.num_bytes - real) < abs(quotient - real) / 3


@pytest.mark.parametrize("rising", [True, False])
def test_a_bracket_closes_on_the_last_n_that_holds(rising):
    def value(n):
        return 9 + 2.1 * n**0.8 if rising else 90 * n**-0.45

    def holds(n, goal):
        return value(n) <= goal

    for goal in [*(value(n) for n in (1, 2, 3, 7, 24, 100, 511, 512, 513)), *np.linspace(3, 300, 40)]:
        values, rounds = {n: value(n) for n in LADDER}, 0
        while wanted := ThresholdSearch(values, goal=goal, rising=rising).wanted:
            values |= {n: value(n) for n in wanted}
            rounds += 1
        holding = [n for n in range(SMALLEST_N, LARGEST_N + 1) if holds(n, goal)]
        expected = (max(holding) if rising else min(holding)) if holding else None
        assert ThresholdSearch(values, goal=goal, rising=rising).found == expected
        assert rounds <= 4


@pytest.mark.parametrize(
    ("sketch", "shown"),
    [
        (ThresholdSketch(tau="1/24"), "1/24"),
        (ThresholdSketch(tau=0.3, draws=4), "0.3 x4"),
        (ThresholdSketch(tau=1 / math.pi), "0.318"),
        (TopkSketch(kind="topk", k=64), "64"),
        (NucleusSketch(kind="nucleus", mass=0.95), "0.95/512"),
        (FullSketch(kind="full"), "all"),
    ],
)
def test_a_setting_is_named_in_a_few_characters(sketch, shown):
    assert sketch.setting == shown


class Here:
    """A cluster that executes each task in the test's own process."""

    def __init__(self):
        self.functions, self.pilots = [], []

    def map_tasks(self, function, tasks, *, name, on_result, **rest):
        for task in tasks:
            self.functions.append(getattr(function, "func", function).__name__)
            if function is score_pilot:
                self.pilots.append(task)
            on_result(task, function(task), Execution(worker="here", seconds=0.0, attempt=1))
        return {}


@pytest.fixture
def here(monkeypatch):
    cluster = Here()

    @contextmanager
    def opened(settings, reporter):
        yield cluster

    monkeypatch.setattr(cluster_module, "open_cluster", opened)
    return cluster


@pytest.fixture
def job(tiny_job, tmp_path):
    def write(target, *, documents=3, folds=0, sequences_per_part=24):
        corpus = {"holdout_fraction": 0.2 if documents == 30 else 0, "sequences_per_part": sequences_per_part}
        path = tiny_job(tmp_path, teacher={"folds": folds}, target={"kind": "threshold", **target}, corpus=corpus)
        content = yaml.safe_load(path.read_text())
        content["corpus"]["sources"][0]["max_documents"] = documents
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def targets_of(path):
    return run_job(load_job(path), SilentReporter(), stages=STAGES).manifest


BUDGETS = [({"budget_bytes": 40}, 40), ({"budget_bytes": 60.5, "draws": 2}, 60.5), ({"max_angle_degrees": 45}, 45)]


@pytest.mark.parametrize(("target", "most"), BUDGETS)
def test_a_finished_part_keeps_the_budget_and_the_next_tau_would_not(
    job, here, tiny_model, tmp_path, target, most, capsys
):
    """Every sequence is in the pilot here and in one part, so what the pilot measures is the part itself."""
    path = job(target)
    manifest = targets_of(path)
    (receipt,) = manifest.parts
    assert receipt.num_sequences <= 16
    n = round(1 / manifest.target["tau"])
    assert manifest.target == ThresholdSketch(tau=1 / n, draws=target.get("draws", 1)).model_dump()

    store = LocalStore(tmp_path / "out/targets")
    sequences = [sequence for (sequence, _), _ in read_rows(store, receipt)]
    teacher = engine(tiny_model)

    def costs(n):
        plan = a_plan(tiny_model, ThresholdSketch(tau=1 / n, draws=target.get("draws", 1)))
        targets, sums = teacher.score(sequences, sketch=plan.sketch, seed=0)
        if "budget_bytes" in target:
            _, metadata = open_part(store.read(receipt.path), uri="part")
            plan = replace(plan, teacher=metadata.teacher)
            return len(build_part(plan, list(zip(sequences, targets, strict=True)), sums)[0]) / sums.num_labels
        return sums.angle_degrees / sums.num_labels

    if "budget_bytes" in target:
        assert receipt.num_bytes / receipt.num_labels == pytest.approx(costs(n), rel=1e-3)
        assert costs(n) <= most < costs(n + 1)
    else:
        assert receipt.fidelity.gradient_angle_degrees == pytest.approx(costs(n))
        assert costs(n) <= most < costs(n - 1)
    assert not verify_targets(store, deep=True).unnamed


def test_a_run_of_many_parts_keeps_the_budget_within_the_noise_of_its_pilot(job, here, tmp_path):
    manifest = targets_of(job({"budget_bytes": 30}, documents=30))
    store = LocalStore(tmp_path / "out/targets")
    rows = [row for part in manifest.parts for row, _ in read_rows(store, part)]
    per_sequence = [(len(t.head_ids) + len(t.tail_ids)) / t.num_labels for _, t in rows]
    assert len(per_sequence) > 100
    # Entries are what bytes go with: the mean of 16 sequences is off by their spread over the root of 16.
    noise = np.std(per_sequence) / np.mean(per_sequence) / math.sqrt(16)
    assert manifest.bytes_per_position <= 30 * (1 + 3 * noise)
    assert manifest.bytes_per_position >= 28 * (1 - 3 * noise)


def test_the_sequences_of_a_pilot_are_spread_over_the_corpus(job, here, tmp_path):
    targets_of(job({"budget_bytes": 30}, documents=30))
    corpus = LocalStore(tmp_path / "out/corpus")
    train = [sequence.sequence_id for sequence in iter_sequences(corpus, read_corpus_manifest(corpus), split="train")]
    assert len(train) > 4 * 24
    (pilot,) = here.pilots
    assert [sequence.sequence_id for sequence in pilot.sequences] == [train[j * len(train) // 16] for j in range(16)]


def test_a_second_run_goes_by_the_first_ones_pilot(job, here, tmp_path):
    path = job({"budget_bytes": 40})
    first = targets_of(path)
    assert here.functions.count("score_pilot") == 1
    (record,) = (tmp_path / "out/targets/pilot").iterdir()
    before = record.stat().st_mtime_ns
    here.functions.clear()
    assert targets_of(path) == first
    assert here.functions == []
    assert record.stat().st_mtime_ns == before


def test_another_budget_has_a_pilot_of_its_own(job, here, tmp_path):
    taus = {targets_of(job({"budget_bytes": budget})).target["tau"] for budget in (40, 50)}
    assert len(taus) == len(here.pilots) == len(list((tmp_path / "out/targets/pilot").iterdir())) == 2


def test_a_tau_that_was_found_gives_the_bytes_of_one_that_is_given(job, here, tmp_path):
    found = targets_of(job({"budget_bytes": 40}))
    here.functions.clear()
    assert targets_of(job({"tau": f"1/{round(1 / found.target['tau'])}"})) == found
    assert here.functions == []


def test_a_corpus_that_has_changed_keeps_its_tau_while_that_keeps_the_budget(job, here, tmp_path, capsys):
    """Of smaller parts a position takes more bytes, which no longer are what was asked for."""
    first = targets_of(job({"budget_bytes": 40}, documents=28, sequences_per_part=400))
    (record,) = (tmp_path / "out/targets/pilot").iterdir()
    pilot = Pilot.model_validate_json(record.read_text())
    (row,) = (row for row in pilot.rows if row.sketch == pilot.chosen)

    def bytes_now(manifest):
        labels = sum(part.num_labels for part in manifest.parts)
        return row.bytes_of_a_part * len(manifest.parts) / labels + row.bytes_of_a_position

    assert bytes_now(first) == pytest.approx(row.bytes_per_position)
    path = job({"budget_bytes": 40}, documents=29, sequences_per_part=400)
    assert main(["corpus", str(path)]) == main(["targets", str(path)]) == 0
    grown = read_manifest(tmp_path / "out/targets")
    assert grown.target == first.target
    assert grown.corpus != first.corpus
    assert len(here.pilots) == 1
    said = capsys.readouterr().err
    tau = f"tau {pilot.chosen.setting} of an earlier corpus kept"
    assert f"pilot: {tau}, {bytes_now(grown):.1f} bytes per position" in said

    smaller = targets_of(job({"budget_bytes": 40}, documents=29, sequences_per_part=8))
    assert bytes_now(smaller) > 40
    assert smaller.target["tau"] > first.target["tau"]
    assert len(here.pilots) == 2
    assert targets_of(job({"budget_bytes": 40}, documents=29, sequences_per_part=12)).target == smaller.target
    assert targets_of(job({"budget_bytes": 40}, documents=28, sequences_per_part=400)).target == first.target
    assert len(here.pilots) == 2


def test_an_angle_keeps_its_tau_whatever_the_parts(job, here):
    target = {"max_angle_degrees": 45}
    taus = {
        targets_of(job(target, documents=documents, sequences_per_part=most)).target["tau"]
        for documents, most in ((28, 400), (29, 400), (20, 8))
    }
    assert len(taus) == len(here.pilots) == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"target": {"budget_bytes": 41}}, {"teacher": {"batch_tokens": 999}}])
def test_another_teacher_target_or_seed_keeps_no_tau(job, here, change):
    path = job({"budget_bytes": 40})
    targets_of(path)
    content = yaml.safe_load(path.read_text())
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    content["corpus"]["sources"][0]["max_documents"] = 4
    path.write_text(yaml.safe_dump(content))
    targets_of(path)
    assert len(here.pilots) == 2


def test_of_two_pilots_at_once_the_first_that_is_kept_counts(job, here, tmp_path, monkeypatch):
    create = LocalStore.create_exclusive

    def overtaken(store, path, content):
        """Another run, with a pilot of its own mind, is a moment faster."""
        if path.startswith("pilot/"):
            pilot = Pilot.model_validate_json(content)
            other = pilot.model_copy(update={"chosen": ThresholdSketch(tau=1 / 6)})
            assert pilot.chosen != other.chosen
            create(store, path, other.model_dump_json().encode())
        return create(store, path, content)

    monkeypatch.setattr(LocalStore, "create_exclusive", overtaken)
    assert targets_of(job({"budget_bytes": 40})).target["tau"] == 1 / 6
    assert len(list((tmp_path / "out/targets/pilot").iterdir())) == 1


def test_a_stopped_pilot_leaves_nothing_and_the_next_run_does_it_all(job, here, tmp_path, monkeypatch):
    path = job({"budget_bytes": 40})
    score_each, rounds = TransformersTeacher.score_each, []

    def stopped(self, *arguments, **options):
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return score_each(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TransformersTeacher, "score_each", stopped)
        with pytest.raises(KeyboardInterrupt):
            targets_of(path)
    assert not list((tmp_path / "out").glob("targets/**/*"))
    assert targets_of(path).target["tau"] < 1 / 2


@pytest.mark.parametrize(
    ("command", "target", "message"),
    [
        ("run", {"budget_bytes": 5}, r"target: budget_bytes 5: even tau 1/2 takes \d+\.\d bytes per position; "),
        (
            "plan",
            {"max_angle_degrees": 0.001},
            r"target: max_angle_degrees 0.001: even tau 1/512 has a gradient angle of \d+\.\d\d degrees; ",
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_2_and_names_the_nearest(job, here, capsys, command, target, message):
    path = job(target, documents=30)
    assert main([command, str(path), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("softshard: job tiny: ")
    assert re.search(message, err)


def test_a_damaged_pilot_is_named_and_3(job, here, tmp_path, capsys):
    path = job({"budget_bytes": 40})
    targets_of(path)
    (record,) = (tmp_path / "out/targets/pilot").iterdir()
    record.write_text(record.read_text()[:-20])
    assert main(["targets", str(path), "--quiet"]) == 3
    assert str(record) in capsys.readouterr().err


def test_the_plan_of_a_budget_names_the_tau_that_the_run_then_picks(job, here, capsys):
    path = job({"budget_bytes": 40}, documents=30)
    assert main(["plan", str(path), "--json", "--quiet"]) == 0
    plan = json.loads(capsys.readouterr().out)
    tau = targets_of(path).target["tau"]
    assert plan["pilot"]["chosen"]["tau"] == pytest.approx(tau, rel=0.1)
    assert plan["target"].startswith("threshold 1/")
    assert plan["budget"] == "budget_bytes 40"


def test_the_table_fits_80_columns_and_marks_the_jobs_target_once(job, capsys, tmp_path):
    path = job({"tau": "1/500", "draws": 2}, documents=30, folds=2)
    assert main(["plan", str(path), "--pilot", "4", "--tokens-per-second", "100", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, lines)) <= 80
    (marked,) = (line for line in lines if line.startswith("* ") and "1/" in line)
    assert marked.split()[:4] == ["*", "threshold", "1/500", "x2"]
    assert any("style teacher is trained only by the run" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_plan_without_a_pilot_has_no_table_and_one_with_has_the_same_figures(job, capsys):
    path = job({"tau": "1/24"}, documents=30)
    plans = []
    for extra in ([], ["--pilot", "30"]):
        assert main(["plan", str(path), "--json", "--quiet", "--tokens-per-second", "100", *extra]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["pilot"] is None
    (own,) = (row for row in plans[1]["pilot"]["rows"] if row["sketch"] == plans[1]["pilot"]["chosen"])
    assert own["num_bytes"] == plans[1]["bytes"]
    assert plans[0]["bytes"] == pytest.approx(plans[1]["bytes"], rel=0.05)
    changed = {name for name in plans[0] if plans[0][name] != plans[1][name]}
    assert changed <= {"pilot", "bytes", "bytes_per_position"}


def test_on_a_real_cluster_the_pilot_runs_on_a_worker(job, tmp_path):
    manifest = targets_of(job({"budget_bytes": 40}, folds=2, documents=6))
    (record,) = (tmp_path / "out/targets/pilot").iterdir()
    pilot = Pilot.model_validate_json(record.read_text())
    assert manifest.target == pilot.chosen.model_dump()
    assert read_manifest(tmp_path / "out/targets") == manifest
    corpus = LocalStore(tmp_path / "out/corpus")
    fold = list(iter_sequences(corpus, read_corpus_manifest(corpus), split="train", folds_excluded=(1,)))
    assert pilot.num_sequences == min(16, len(fold))


@pytest.mark.parametrize("count", ["0", "1", "x"])
def test_too_few_sequences_for_a_pilot_are_2(count, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "job.yaml", "--pilot", count])
    assert ended.value.code == 2
