import pytest
import yaml

from softshard.config.job_file import load_job
from softshard.errors import JobInvalid

GOOD = {
    "name": "night",
    "out": "runs/night",
    "corpus": {
        "sources": [
            {"name": "tales", "uri": "tales.txt", "style": "literary", "license": "CC0-1.0", "rights_basis": "owned"}
        ]
    },
    "teacher": {"model": "models/tiny"},
}


def written(tmp_path, content):
    path = tmp_path / "job.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**changes):
    """GOOD with dotted keys set; None removes one."""
    job = yaml.safe_load(yaml.safe_dump(GOOD))
    for dotted, value in changes.items():
        *folders, last = dotted.split("__")
        node = job
        for folder in folders:
            node = node[int(folder)] if folder.isdigit() else node.setdefault(folder, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return job


def test_defaults_are_those_of_the_design(tmp_path):
    job = load_job(written(tmp_path, GOOD), check_paths=False)
    assert job.target.kind == "threshold"
    assert job.target.tau == pytest.approx(1 / 24)
    assert job.teacher.folds == 2
    assert job.train.alpha <= 0.5
    assert job.corpus.overlap_tokens < job.corpus.context_tokens


def test_a_fraction_may_be_written_as_text(tmp_path):
    job = load_job(written(tmp_path, changed(target={"kind": "threshold", "tau": "1/50"})), check_paths=False)
    assert job.target.tau == 0.02


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        ({"colour": "red"}, "colour", "unknown key"),
        ({"corpus__sources__0__license": None}, "corpus.sources[0].license", "is missing"),
        ({"corpus__sources__0__rights_basis": None}, "corpus.sources[0].rights_basis", "is missing"),
        ({"corpus__sources__0__license": "free"}, "corpus.sources[0].license", "not an SPDX"),
        ({"corpus__sources__0__rights_basis": "found"}, "corpus.sources[0].rights_basis", "should be"),
        ({"corpus__sources": []}, "corpus.sources", "at least 1"),
        ({"corpus__context_tokens": "many"}, "corpus.context_tokens", "not 'many'"),
        ({"corpus__context_tokens": 64, "corpus__overlap_tokens": 64}, "corpus", "must be less than context_tokens"),
        ({"corpus__holdout_fraction": 1.5}, "corpus.holdout_fraction", "less than 1"),
        ({"teacher__folds": 1}, "teacher", "0 or at least 2"),
        ({"teacher__engine": "abacus"}, "teacher.engine", "should be"),
        ({"teacher__engine": "vllm", "teacher__device": "cuda:1"}, "teacher", "CUDA_VISIBLE_DEVICES"),
        ({"teacher__vllm": {"max_num_batched_tokens": 8}}, "teacher.vllm", "at least max_num_seqs"),
        ({"target": {"kind": "magic"}}, "target", "magic"),
        ({"target": {"kind": "topk", "tau": 0.1}}, "target.tau", "unknown key"),
        ({"target": {"tau": 0.1}}, "target", "needs a `kind`"),
        ({"target": {"kind": "threshold", "tau": 2}}, "target.tau", "less than or equal to 1"),
        ({"train__alpha": -0.1}, "train.alpha", "greater than or equal to 0"),
        ({"out": "gs://bucket/run"}, "out", "local folder"),
        ({"out": "s3://key:secret@bucket/run"}, "out", "holds a credential"),
        ({"name": "a b"}, "name", "should match"),
        ({"target": {"kind": "threshold", "tau": "1e400"}}, "target.tau", "finite number"),
        ({"teacher__device": "gpu"}, "teacher.device", "should match"),
        ({"train__revision": "main"}, "train.revision", "has no `train.model`"),
        ({"evaluate__sample_tokens": 600}, "evaluate.sample_tokens", "more than context_tokens"),
        ({"corpus__sources__0__uri": "nowhere/*.txt"}, "corpus.sources[0].uri", "no such file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, changes, place, problem):
    path = written(tmp_path, changed(**changes))
    with pytest.raises(JobInvalid) as caught:
        load_job(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: line ")
    assert f", {place}: " in message
    assert problem in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_line_is_that_of_the_key(tmp_path):
    text = "name: a\nout: b\nteacher:\n  model: m\n  fold: 3\ncorpus:\n  sources: []\n"
    with pytest.raises(JobInvalid, match=r"line 5, teacher\.fold: unknown key.*line 7, corpus\.sources"):
        load_job(written(tmp_path, text))


def test_source_names_must_differ(tmp_path):
    source = GOOD["corpus"]["sources"][0]
    with pytest.raises(JobInvalid, match="tales is given more than once"):
        load_job(written(tmp_path, changed(corpus__sources=[source, source])))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "is not YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("name: a\nname: b\n", r"line 2, name: the key is given twice \(first on line 1\)"),
        ("name: !!python/object:os.system x\n", "is not YAML"),
    ],
)
def test_what_is_not_a_job_is_refused(tmp_path, text, problem):
    with pytest.raises(JobInvalid, match=problem):
        load_job(written(tmp_path, text))


def test_missing_job_file_is_named(tmp_path):
    with pytest.raises(JobInvalid, match=r"no\.yaml: cannot be read"):
        load_job(tmp_path / "no.yaml")


def test_job_is_frozen(tmp_path):
    job = load_job(written(tmp_path, GOOD), check_paths=False)
    with pytest.raises(ValueError, match="frozen"):
        job.seed = 3


def test_missing_paths_are_named_with_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, GOOD)
    with pytest.raises(JobInvalid, match=r"line 6, corpus\.sources\[0\]\.uri: tales\.txt: no such file"):
        load_job(path)
    (tmp_path / "tales.txt").write_text("Once.")
    assert load_job(path).teacher.model == "models/tiny"  # may be a model of the hub
    with pytest.raises(JobInvalid, match=r"teacher\.model: \./models/tiny: no such folder"):
        load_job(written(tmp_path, changed(teacher__model="./models/tiny")))


def test_retention_sources_must_differ_in_name_too(tmp_path):
    source = GOOD["corpus"]["sources"][0]
    with pytest.raises(JobInvalid, match=r"train\.retention.*tales is given more than once"):
        load_job(written(tmp_path, changed(train__retention={"sources": [source, source]})))


def test_file_scheme_of_the_output_is_the_plain_path(tmp_path):
    job = load_job(written(tmp_path, changed(out=f"file://{tmp_path}/out")), check_paths=False)
    assert job.out == f"{tmp_path}/out"
