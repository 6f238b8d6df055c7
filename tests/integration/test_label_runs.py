"""A whole job on a corpus with context between labels: its targets, its training, and what maintains them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes.outputs import tree
from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.corpus import reading
from softshard.corpus.manifest import read_corpus_manifest
from softshard.shard.manifest import read_manifest
from softshard.stages.job import run_job
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


def spans_in(length):
    """Two answers with context before, between and after them."""
    return ((3, 8), (12, length - 2)) if length > 20 else ((1, length),)


@pytest.fixture(scope="module", autouse=True)
def masked():
    """Windows with answers, in place of those that a source of conversations would give."""
    windows = reading.document_windows

    def masked_windows(document, **settings):
        for tokens in windows(document, **settings):
            yield replace(tokens, label_spans=spans_in(len(tokens.token_ids)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "document_windows", masked_windows)
        yield


@pytest.fixture(scope="module")
def out(tiny_job, tmp_path_factory):
    """Output folder of the job; not to be changed."""
    folder = tmp_path_factory.mktemp("conversations")
    changes = {"teacher": {"folds": 0}, "train": {"retention": None, "baseline": None}}
    path = tiny_job(folder, target={"kind": "topk", "k": 6}, **changes)
    run_job(load_job(path), SilentReporter(), stages=("corpus", "teacher", "targets", "train"))
    return folder / "out"


@pytest.fixture
def copy(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    job = tmp_path / "out/job.yaml"
    job.write_text(job.read_text().replace(str(out), str(tmp_path / "out")))
    return tmp_path / "out"


def test_every_part_is_of_version_2_and_of_exactly_the_labels_of_its_slice(out):
    manifest, corpus = read_manifest(out / "targets"), read_corpus_manifest(LocalStore(out / "corpus"))
    assert (manifest.schema_version, corpus.schema_version) == (2, 3)
    for part in manifest.parts:
        frame = pl.read_parquet(out / "targets" / part.path)
        lengths = frame["token_ids"].list.len().to_list()
        runs = frame["label_runs"].to_list()
        bounds = [[0, *(bound for span in spans_in(length) for bound in span), length] for length in lengths]
        assert runs == [[n for n in np.diff(own).tolist() if n] for own in bounds]
        labels = [sum(stop - start for start, stop in spans_in(length)) for length in lengths]
        assert frame["entropy"].list.len().to_list() == labels
        assert sum(labels) == part.num_labels


def test_stored_heads_are_those_of_the_model_at_each_answer(out, tiny_model):
    part = read_manifest(out / "targets").parts[0]
    metadata = json.loads(pl.read_parquet_metadata(out / "targets" / part.path)["softshard"])
    frequent = metadata["frequent_ids"]
    by_rank = np.append(frequent, np.setdiff1d(np.arange(metadata["vocab_size"]), frequent)).astype(int)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double().eval()
    for values in pl.read_parquet(out / "targets" / part.path).head(6).iter_rows(named=True):
        ids = torch.tensor([values["token_ids"]])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, :, : metadata["vocab_size"]], -1).numpy()
        places = [place for span in spans_in(ids.shape[1]) for place in range(*span)]
        heads = by_rank[values["head_ranks"]].reshape(len(places), 6)
        for j, place in enumerate(places):
            exact = logp[place - 1]
            assert set(heads[j]) == set(np.argsort(-exact, kind="stable")[:6])
            assert abs(values["label_logprob"][j] - exact[ids[0, place]]) <= 1 / 32 + 1e-4
            assert abs(values["tail_mass"][j] - (1 - np.exp(exact[heads[j]]).sum())) <= 1 / 510 + 1e-5


def test_the_student_is_trained_on_them(out):
    trained = json.loads((out / "adapter/adapter.json").read_text())
    assert trained
    assert list((out / "adapter").glob("*/receipt.json"))


def test_polars_reads_the_whole_folder_at_once(out):
    frame = pl.read_parquet(out / "targets/data/train/*.parquet")
    assert frame.height == sum(part.num_sequences for part in read_manifest(out / "targets").of_split("train"))


@pytest.mark.parametrize("arguments", [["--deep"], ["--against-teacher", "6"]])
def test_output_verifies(out, arguments, capsys):
    assert main(["verify", str(out), *arguments, "--quiet"]) == 0
    capsys.readouterr()


def test_show_has_a_position_for_each_label_and_for_no_other_token(out, capsys):
    values = pl.read_parquet(out / "targets" / read_manifest(out / "targets").parts[0].path).row(0, named=True)
    assert main(["show", str(out), "--sequence", values["sequence_id"], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    places = [place for span in spans_in(len(values["token_ids"])) for place in range(*span)]
    assert [position["place"] for position in shown["positions"]] == places
    assert main(["status", str(out)]) == 0


def test_damaged_part_and_slice_are_made_again_to_the_same_bytes(copy, out, capsys):
    manifest, corpus = read_manifest(copy / "targets"), read_corpus_manifest(LocalStore(copy / "corpus"))
    for path in (copy / "targets" / manifest.parts[1].path, copy / "corpus" / corpus.slices[0].path):
        path.write_bytes(path.read_bytes()[:-9])
    assert main(["verify", str(copy), "--quiet"]) == 3
    assert main(["repair", str(copy), "--quiet"]) == 0
    assert main(["verify", str(copy), "--deep", "--quiet"]) == 0
    assert tree(copy, of=("corpus", "targets")) == tree(out, of=("corpus", "targets"))


def test_plan_measures_parts_that_can_hold_the_labels(copy, capsys):
    assert main(["plan", str(copy), "--pilot", "2", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pilot"]["rows"]
