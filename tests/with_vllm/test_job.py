"""A job with `engine: vllm` through the command line, on Dask's own workers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from softshard.cli import main
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.storage import LocalStore

ENGINE = {"kv_cache_gib": 0.25, "max_num_batched_tokens": 512}


def targets_of(job, capsys):
    """Manifest of a job's targets, and its rows by sequence id, after all stages that lead there."""
    for stage in ("corpus", "teacher", "targets"):
        assert main([stage, str(job), "--quiet"]) == 0, capsys.readouterr().err
    out = job.parent / "out"
    assert main(["verify", str(out), "--deep", "--quiet"]) == 0
    manifest = read_manifest(out / "targets")
    store = LocalStore(out / "targets")
    rows = {}
    for receipt in manifest.parts:
        for (sequence, targets), metadata in read_rows(store, receipt):
            rows[sequence.sequence_id] = targets, metadata, receipt.fold
    return manifest, rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm"), tmp_path_factory.mktemp("transformers")


def test_targets_of_both_engines_agree_and_verify(tiny_job, folders, capsys):
    ours, theirs = folders
    manifest, rows = targets_of(tiny_job(ours, teacher={"engine": "vllm", "vllm": ENGINE}), capsys)
    other, other_rows = targets_of(tiny_job(theirs), capsys)
    assert manifest.teacher["engine"] == "vllm"
    assert manifest.teacher["holdout_engine"] == "transformers"
    assert manifest.teacher["adapters"] == other.teacher["adapters"]
    assert rows.keys() == other_rows.keys()
    engines = set()
    for name, (targets, metadata, fold) in rows.items():
        expected = other_rows[name][0]
        engines.add((fold >= 0, metadata.teacher["engine"]))
        # Both were put on the same grid: where noise moves a value across a border, by one step.
        np.testing.assert_allclose(targets.label_logprob, expected.label_logprob, atol=0.07)
        assert np.mean(targets.label_logprob == expected.label_logprob) > 0.97
        assert np.mean(targets.head_count == expected.head_count) > 0.97
    assert engines == {(True, "vllm"), (False, "transformers")}
    assert manifest.fidelity.mean_squared_error == pytest.approx(other.fidelity.mean_squared_error, rel=1e-2)


def test_a_second_run_finds_all_parts_and_plan_measures_the_engine(folders, capsys):
    job = folders[0] / "job.yaml"
    before = sorted((folders[0] / "out/targets/receipts").iterdir())
    assert main(["targets", str(job), "--quiet"]) == 0
    assert sorted((folders[0] / "out/targets/receipts").iterdir()) == before
    capsys.readouterr()
    assert main(["plan", str(job), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_second"] > 0


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_stored_targets_are_as_either_engine_says(folders, engine, capsys):
    out = str(folders[0] / "out")
    assert main(["verify", out, "--against-teacher", "6", "--engine", engine, "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against_teacher"]
    assert found["num_beyond"] == 0
    assert engine in found["engines"]
    assert found["label_nats_max"] <= 1 / 32 + 1e-3
