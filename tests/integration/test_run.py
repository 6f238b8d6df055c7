"""The whole job on a tiny model: what it leaves, what it does again, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from fakes.outputs import times, tree
from softshard.config.job_file import load_job
from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import (
    AdapterMissing,
    CorpusEmpty,
    JobInvalid,
    ManifestMissing,
    ModelInvalid,
    OutputForeign,
    PartCorrupt,
    PartsFailed,
    TokenizerMismatch,
    VocabularyMismatch,
)
from softshard.finetune.adapters.lora import load_adapter
from softshard.models import load_model
from softshard.shard.manifest import read_manifest
from softshard.stages import STAGES
from softshard.stages.evaluate import read_report
from softshard.stages.job import run_job
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


def run(path, *stages):
    return run_job(load_job(path), SilentReporter(), stages=stages or STAGES)


def copy_of(finished, folder, **changes):
    """A copy of a finished output, and a job for it."""
    import shutil

    shutil.copytree(finished, folder / "out")
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["out"] = str(folder / "out")
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = job
        for parent in parents:
            node = node[parent]
        node[last] = value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def test_every_stage_leaves_what_it_says(finished):
    manifest = read_manifest(finished / "targets")
    corpus = read_corpus_manifest(LocalStore(finished / "corpus"))
    assert corpus is not None
    assert manifest.corpus == corpus.digest
    assert [part.slice for part in manifest.parts] == [part.sha256 for part in corpus.slices]
    assert sum(part.num_labels for part in manifest.parts) == sum(part.num_labels for part in corpus.slices)
    assert {part.fold for part in manifest.of_split("train")} == {0, 1}
    assert {part.fold for part in manifest.of_split("test")} == {-1}
    metrics = json.loads((finished / "report/metrics.json").read_text())
    for name in ("base", "ce", "adapter"):
        for field in ("human_nll_nats", "bits_per_byte", "ece", "mattr", "sentence_length_w1", "token_l2"):
            assert isinstance(metrics[name][field], float)
        assert metrics[name]["retention_nll_nats"] > 0
        assert metrics[name]["ms_per_token"] > 0
    assert (finished / "report/index.html").read_text().startswith("<!DOCTYPE html>")


def test_each_document_is_scored_by_the_adapter_that_has_not_seen_it(finished):
    """The parts' teachers, by digest, are those that were trained on the other fold's slices."""
    manifest = read_manifest(finished / "targets")
    adapters = manifest.teacher["adapters"]
    corpus = read_corpus_manifest(LocalStore(finished / "corpus"))
    labels = {fold: sum(p.num_labels for p in corpus.slices if (p.split, p.fold) == ("train", fold)) for fold in (0, 1)}
    receipts = [json.loads(path.read_text()) for path in sorted((finished / "teacher").glob("fold-*/receipt.json"))]
    assert [receipt["num_labels"] for receipt in receipts] == [labels[1], labels[0]]
    assert [receipt["digest"] for receipt in receipts] == adapters
    for part in manifest.parts:
        metadata = json.loads(pl.read_parquet_metadata(finished / "targets" / part.path)["softshard"])
        expected = adapters if part.fold < 0 else [adapters[part.fold]]
        assert metadata["teacher"]["adapters"] == expected


def test_a_part_read_by_polars_alone_is_the_teachers_distribution(finished, tiny_model):
    manifest = read_manifest(finished / "targets")
    part = manifest.of_split("train")[0]
    table = pl.read_parquet(finished / "targets" / part.path)
    metadata = json.loads(pl.read_parquet_metadata(finished / "targets" / part.path)["softshard"])
    folder = next((finished / "teacher").glob(f"fold-{part.fold}-*"))
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    model = load_adapter(model, folder, adapter_name="default", device="cpu")
    for row in table.head(5).iter_rows(named=True):
        with torch.no_grad():
            logits = model(torch.tensor([row["token_ids"]])).logits[0, :, : metadata["vocab_size"]]
        before = logits[row["first_label"] - 1 : -1].double()
        probabilities = torch.softmax(before, -1).numpy()
        others = np.setdiff1d(np.arange(metadata["vocab_size"]), metadata["frequent_ids"])
        by_rank = np.append(metadata["frequent_ids"], others).astype(int)
        start = step = 0
        for j, count in enumerate(row["head_count"]):
            ids = by_rank[row["head_ranks"][start : start + count]]
            exact = np.log(probabilities[j, ids])
            between = np.array(row["head_steps"][step : step + max(count - 1, 0)]) * metadata["step"]
            assert np.all(np.abs(exact[:1] - np.append([0], between.cumsum())[:count] - exact) <= 0.025 + 1e-4)
            assert set(ids) == set(np.flatnonzero(probabilities[j] >= metadata["tau"]))
            assert abs(row["tail_mass"][j] - (1 - probabilities[j, ids].sum())) <= 1 / 510 + 1e-5
            start, step = start + count, step + max(count - 1, 0)


def test_a_second_run_changes_nothing(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    before = times(tmp_path / "out/targets") | times(tmp_path / "out/adapter") | times(tmp_path / "out/teacher")
    run(path)
    after = times(tmp_path / "out/targets") | times(tmp_path / "out/adapter") | times(tmp_path / "out/teacher")
    assert after == before


def test_two_local_workers_give_the_bytes_of_one_that_is_reached_by_its_address(finished, tiny_job, tmp_path):
    run(tiny_job(tmp_path, cluster={"workers": 2}), "corpus", "teacher", "targets")
    of = ("corpus", "teacher", "targets")
    assert tree(tmp_path / "out", of=of) == tree(finished, of=of)


def test_a_changed_alpha_trains_again_and_recomputes_no_part(finished, tmp_path):
    path = copy_of(finished, tmp_path, train__alpha=0.25)
    before = times(tmp_path / "out/targets") | times(tmp_path / "out/teacher")
    outcome = run(path)
    assert times(tmp_path / "out/targets") | times(tmp_path / "out/teacher") == before
    assert outcome.trained.adapter.alpha == 0.25
    kept = {folder.name for folder in (finished / "adapter").glob("baseline-*")}
    assert {folder.name for folder in (tmp_path / "out/adapter").glob("baseline-*")} == kept


def test_a_changed_sketch_recomputes_parts_and_keeps_the_teacher(finished, tmp_path):
    path = copy_of(finished, tmp_path, target={"kind": "topk", "k": 8})
    before = times(tmp_path / "out/teacher")
    run(path, "targets")
    assert times(tmp_path / "out/teacher") == before
    old, new = read_manifest(finished / "targets"), read_manifest(tmp_path / "out/targets")
    assert not {part.part_id for part in old.parts} & {part.part_id for part in new.parts}
    assert (tmp_path / "out/targets" / old.parts[0].path).exists()


def test_a_lost_part_is_computed_again_to_the_same_bytes(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    part = read_manifest(finished / "targets").parts[2]
    (tmp_path / "out/targets" / part.path).unlink()
    run(path, "targets")
    assert tree(tmp_path / "out", of=("targets",)) == tree(finished, of=("targets",))


def test_an_unadapted_teacher_needs_no_adapter(tiny_job, tmp_path):
    run(tiny_job(tmp_path, teacher={"folds": 0}), "corpus", "teacher", "targets")
    manifest = read_manifest(tmp_path / "out/targets")
    assert manifest.teacher["adapters"] == []
    assert {part.fold for part in manifest.parts} == {-1}


def test_a_stage_refuses_to_go_before_the_one_it_needs(tiny_job, tmp_path):
    path = tiny_job(tmp_path)
    with pytest.raises(ManifestMissing, match="softshard corpus"):
        run(path, "targets")
    run(path, "corpus")
    with pytest.raises(ManifestMissing, match="softshard teacher"):
        run(path, "targets")


def test_evaluation_before_training_says_so(finished, tmp_path):
    with pytest.raises(AdapterMissing, match="softshard train"):
        run(copy_of(finished, tmp_path, train__alpha=0.125), "evaluate")


def test_output_of_another_job_is_refused(finished, tmp_path):
    path = copy_of(finished, tmp_path, name="another")
    with pytest.raises(OutputForeign, match="belongs to job 'tiny', and this job's name is 'another'"):
        run(path)


def test_folder_with_other_things_is_refused(tiny_job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(OutputForeign, match=r"no job\.yaml"):
        run(tiny_job(tmp_path))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_truncated_part_stops_training_with_its_name(finished, tmp_path):
    path = copy_of(finished, tmp_path, train__alpha=0.2)
    part = read_manifest(finished / "targets").of_split("train")[0]
    file = tmp_path / "out/targets" / part.path
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(PartCorrupt, match=part.path) as caught:
        run(path, "train")
    assert caught.value.exit_code == 3


def test_an_unchanged_report_is_not_made_again(finished):
    before = times(finished / "report")
    run(finished / "job.yaml")
    assert times(finished / "report") == before


def test_a_report_that_was_cut_off_is_made_again(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    run(path)
    metrics = (tmp_path / "out/report/metrics.json").read_bytes()
    (tmp_path / "out/report/key.txt").write_bytes(b"")
    (tmp_path / "out/report/metrics.json").write_text("{}")
    run(path)
    again = json.loads((tmp_path / "out/report/metrics.json").read_bytes())
    assert again["adapter"]["human_nll_nats"] == json.loads(metrics)["adapter"]["human_nll_nats"]


@pytest.mark.parametrize("section", ["teacher", "train"])
def test_how_often_is_checkpointed_changes_no_id(finished, tmp_path, section):
    path = copy_of(finished, tmp_path)
    job = yaml.safe_load(path.read_text())
    job[section]["optimizer"]["checkpoint_steps"] = 3
    path.write_text(yaml.safe_dump(job, sort_keys=False))

    def written():
        """When each file was, but for the cards, which have all settings."""
        found = times(tmp_path / "out/teacher") | times(tmp_path / "out/adapter")
        return {file: at for file, at in found.items() if not str(file).endswith("/card.json")}

    before = written()
    run(path, "train")
    assert written() == before


def test_a_wrong_model_leaves_a_finished_output_as_it_was(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    before = (tmp_path / "out/job.yaml").read_bytes()
    (tmp_path / "empty").mkdir()
    job = yaml.safe_load(path.read_text())
    job["teacher"]["model"] = str(tmp_path / "empty")
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    with pytest.raises(ModelInvalid, match=r"no config\.json"):
        run(path, "evaluate")
    assert (tmp_path / "out/job.yaml").read_bytes() == before


def test_sequences_longer_than_the_model_are_refused(tiny_job, tmp_path):
    with pytest.raises(ModelInvalid, match="has 512 positions"):
        run(tiny_job(tmp_path, corpus={"context_tokens": 1024}))


def test_teacher_with_a_smaller_vocabulary_is_refused_before_it_trains(tiny_job, tmp_path):
    from fakes.tiny import save_tiny_model

    small = save_tiny_model(tmp_path / "small", vocab_size=290)
    with pytest.raises(VocabularyMismatch, match="gives logits for 290 tokens"):
        run(tiny_job(tmp_path, teacher={"model": str(small)}))


def test_a_run_that_was_complete_notices_a_truncated_part(finished, tmp_path):
    path = copy_of(finished, tmp_path)
    part = read_manifest(finished / "targets").parts[1]
    file = tmp_path / "out/targets" / part.path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PartCorrupt, match=rf"has {part.num_bytes - 1:,} bytes, its receipt names {part.num_bytes:,}"):
        run(path)


def test_student_with_another_tokenizer_is_refused(finished, tmp_path):
    from fakes.tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "student", words=("quince",) * 400)
    with pytest.raises(TokenizerMismatch, match="student"):
        run(copy_of(finished, tmp_path, train__model=str(other)), "train")


def test_a_chat_model_of_the_same_vocabulary_is_trained_on_targets_of_its_base_model(finished, tiny_model, tmp_path):
    """It has a special token more, with which its own tokenizer ends a text."""
    import shutil

    from transformers import PreTrainedTokenizerFast

    chat = shutil.copytree(tiny_model, tmp_path / "chat")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(chat)
    outcome = run(copy_of(finished, tmp_path, train__model=str(chat)), "train", "evaluate")
    of_base = read_report(LocalStore(finished / "report"))
    # The weights are those of the base model, and the targets end with its token, so all figures are its own.
    for name in ("human", "base", "adapter"):
        its, of_its_base = (getattr(report, name).model_dump() for report in (outcome.report, of_base))
        assert {**its, "ms_per_token": None} == {**of_its_base, "ms_per_token": None}


@pytest.mark.parametrize("logits", [304, 384])
def test_a_student_whose_logits_are_padded_to_another_size_is_trained(finished, tmp_path, logits):
    """The targets' teacher has 320 logits for its 300 tokens; logits beyond the tokens stand for nothing."""
    from fakes.tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "student", vocab_size=logits)
    path = copy_of(finished, tmp_path, train__model=str(other), train__baseline=None, train__retention=None)
    assert run(path, "train").trained.adapter.num_steps > 0


def test_student_with_a_smaller_vocabulary_is_refused(finished, tiny_model, tmp_path):
    from fakes.tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "student", vocab_size=290)
    with pytest.raises(VocabularyMismatch, match=r"student: gives logits for 290 tokens.*a vocabulary of 300"):
        run(copy_of(finished, tmp_path, train__model=str(other)), "train")


def test_evaluation_without_a_hold_out_is_refused_before_anything_runs(tiny_job, tmp_path):
    path = tiny_job(tmp_path, corpus={"holdout_fraction": 0})
    with pytest.raises(JobInvalid, match=r"corpus\.holdout_fraction: is 0"):
        run(path)
    assert not (tmp_path / "out").exists()


def test_part_that_cannot_be_scored_is_set_aside_and_named(finished, tiny_job, tiny_model, tmp_path):
    """A model whose weights are broken: every part fails at once, with the reason, and there is no manifest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[:] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "broken")
    path = tiny_job(tmp_path, teacher={"folds": 0, "model": str(tmp_path / "broken")})
    with pytest.raises(PartsFailed, match=r"no manifest was written.*logits of the teacher contain"):
        run(path, "corpus", "teacher", "targets")
    assert not (tmp_path / "out/targets/manifest.json").exists()


def test_corpus_of_nothing_is_named_with_its_counts(tiny_job, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n{"text": ""}\n')
    source = {
        "name": "e",
        "uri": str(tmp_path / "empty.jsonl"),
        "style": "s",
        "license": "MIT",
        "rights_basis": "owned",
    }
    with pytest.raises(CorpusEmpty, match="2 empty"):
        run(tiny_job(tmp_path, corpus={"sources": [source]}))


KILL = """
import os, signal, sys
import softshard.storage.local as storage
from softshard.config.job_file import load_job
from softshard.stages.job import run_job
from softshard.telemetry import SilentReporter
# Every write of the job's own process counts; the one that is asked for is cut short in its middle by SIGKILL.
point, writes = int(sys.argv[2]), 0
def dying(file):
    global writes
    writes += 1
    if writes == point:
        file.truncate(10)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
sync, storage._sync = storage._sync, dying
if __name__ == "__main__":
    run_job(load_job(sys.argv[1]), SilentReporter())
    print("finished")
"""


@pytest.mark.parametrize("point", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7)), 16])
def test_killed_run_resumes_to_the_same_bytes(finished, tiny_job, tmp_path, point):
    path = tiny_job(tmp_path)
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    killed = subprocess.run([sys.executable, str(script), str(path), str(point)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    run(path, "corpus", "teacher", "targets", "train")
    of = ("corpus", "teacher", "targets")
    assert tree(tmp_path / "out", of=of) == tree(finished, of=of)
    adapters = {name: digest for name, digest in tree(finished, of=("adapter",)).items() if "safetensors" in name}
    resumed = tree(tmp_path / "out", of=("adapter",))
    assert {name: resumed[name] for name in adapters} == adapters


def test_ce_as_the_objective_and_no_baseline(finished, tmp_path):
    path = copy_of(finished, tmp_path, train__objective="ce", train__baseline=None, train__retention=None)
    outcome = run(path)
    assert outcome.trained.adapter.objective == "ce"
    assert outcome.trained.baseline is None
    assert outcome.report.ce is None
    assert outcome.report.adapter.retention_nll_nats is None


@pytest.mark.parametrize("target", [{"kind": "nucleus", "mass": 0.9}, {"kind": "full"}, {"kind": "topk", "k": 16}])
def test_every_kind_goes_through_the_whole_job(finished, tmp_path, target):
    outcome = run(copy_of(finished, tmp_path, target=target, train__baseline=None))
    assert outcome.report.adapter.human_nll_nats < outcome.report.base.human_nll_nats
    assert (outcome.report.targets.mean_kl_nats is not None) == (target["kind"] == "full")
    assert (outcome.report.adapter.kl_to_teacher_nats is not None) == (target["kind"] == "full")
