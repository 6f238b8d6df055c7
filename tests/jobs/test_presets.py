"""The presets: jobs that load, whose targets can be mixed, and that run."""

from pathlib import Path

import pytest
import yaml

from fakes.tiny import write_documents
from softshard.config.job_file import load_job
from softshard.shard.manifest import read_manifest
from softshard.stages.job import run_job
from softshard.telemetry import SilentReporter

PRESETS = sorted((Path(__file__).parents[2] / "jobs/presets").glob("*.yaml"))
STYLES = ["academic", "conversational", "literary", "technical"]


def test_each_style_has_a_preset_with_its_name_and_folder():
    assert [path.stem for path in PRESETS] == STYLES
    for path in PRESETS:
        job = load_job(path, check_paths=False)
        assert (job.name, job.out) == (path.stem, f"runs/{path.stem}")
        assert {source.style for source in job.corpus.sources} == {path.stem}
        assert job.train.retention is not None
        assert path.stem not in {source.style for source in job.train.retention.sources}


def test_presets_differ_in_their_text_alone():
    def rest(path):
        job = load_job(path, check_paths=False).model_dump(mode="json")
        del job["name"], job["out"], job["corpus"]["sources"], job["train"]["retention"]["sources"]
        return job

    assert all(rest(path) == rest(PRESETS[0]) for path in PRESETS)


def test_the_mixed_job_is_the_literary_preset_with_the_targets_of_another():
    folder = PRESETS[0].parent
    mixed, literary = (
        load_job(path, check_paths=False).model_dump(mode="json")
        for path in (folder.parent / "mixed.yaml", folder / "literary.yaml")
    )
    targets = mixed["train"].pop("targets")
    assert [other["out"] for other in targets["others"]] == ["runs/conversational"]
    assert literary["train"].pop("targets") is None
    assert (mixed.pop("name"), mixed.pop("out")) == ("mixed", "runs/mixed")
    assert mixed == {key: value for key, value in literary.items() if key not in ("name", "out")}


@pytest.mark.parametrize(
    "path", [PRESETS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in PRESETS[1:])], ids=STYLES
)
def test_a_preset_makes_its_targets_from_other_documents_with_another_model(path, tiny_model, tmp_path):
    job = yaml.safe_load(path.read_text())
    (source,) = job["corpus"]["sources"]
    documents = write_documents(tmp_path / "documents.jsonl", num_documents=20)
    source |= {"uri": str(documents), "group_field": "author"}
    job["train"]["retention"]["sources"][0]["uri"] = str(documents)
    job["teacher"] |= {"model": str(tiny_model), "folds": 0}
    job["out"], job["corpus"]["context_tokens"] = str(tmp_path / "out"), 48
    job["evaluate"] = {"prompt_tokens": 8, "sample_tokens": 16}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    run_job(load_job(tmp_path / "job.yaml"), SilentReporter(), stages=("corpus", "teacher", "targets"))
    assert read_manifest(tmp_path / "out/targets").of_split("test")
