import json
import re

import pytest
import yaml

from softshard.config import ThresholdSketch
from softshard.config.job_file import load_job, parse_values
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
    assert job.train.alpha == 0.75
    assert job.corpus.overlap_tokens < job.corpus.context_tokens


def test_a_fraction_may_be_written_as_text(tmp_path):
    job = load_job(written(tmp_path, changed(target={"kind": "threshold", "tau": "1/50"})), check_paths=False)
    assert job.target.tau == 0.02


@pytest.mark.parametrize(
    ("changes", "place", "problem"),
    [
        ({"colour": "red"}, "colour", "unknown key"),
        ({"corpus__sources__0__license": None}, "corpus.sources[0]", "`license` is missing"),
        ({"corpus__sources__0__rights_basis": None}, "corpus.sources[0]", "`rights_basis` is missing"),
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
        ({"target": {"kind": "magic"}}, "target.kind", "unknown kind 'magic'; the kinds are 'threshold', 'topk'"),
        ({"target": {"kind": "topk", "tau": 0.1}}, "target.tau", "unknown key"),
        ({"target": {"tau": 1e-6}}, "target.tau", "must be from 1/32768 to 1, not 1e-06"),
        ({"target": {"k": 3}}, "target.k", "unknown key"),
        ({"target": {"threshold": 3}}, "target.threshold", "unknown key"),
        ({"target": {"kind": "nucleus"}, "train__temperature": 2}, "train.temperature", "kind nucleus"),
        ({"train__divergence": "reverse"}, "train.divergence", "whose tail is sampled"),
        ({"target": {"kind": "threshold", "tau": 2}}, "target.tau", "must be from 1/32768 to 1, not 2"),
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


SOURCE = GOOD["corpus"]["sources"][0]
ONE_PROBLEM = [
    (
        {"corpus__sources": [SOURCE | {"licence": "MIT"}]},
        "corpus.sources[0].licence: unknown key; did you mean `license`?",
    ),
    ({"corpus__sources": [SOURCE | {"uri": 5}]}, "corpus.sources[0].uri: input should be a valid string, not 5"),
    (
        {"corpus__sources": [3]},
        "corpus.sources[0]: input should be a section with keys such as `name`, `uri`, `format`, not 3",
    ),
    ({"corpus__sources": []}, "corpus.sources: input should be a list of at least 1 item(s), not []"),
    ({"corpus__sources": "a.txt"}, "corpus.sources: input should be a list, not 'a.txt'"),
    ({"teacher": "m"}, "teacher: input should be a section with keys such as `model`, `revision`, `engine`, not 'm'"),
    (
        {"target": "topk"},
        "target: input should be a section with keys such as `kind`, `temperature`, `step`, not 'topk'",
    ),
    ({"traim": {}}, "traim: unknown key; did you mean `train`?"),
    ({"train__lr": 1}, "train.lr: unknown key; did you mean `train.optimizer.learning_rate`?"),
    ({"train__optimizer": {"lr": 1}}, "train.optimizer.lr: unknown key; did you mean `learning_rate`?"),
    ({"train__baseline": {"lr": 1}}, "train.baseline.lr: unknown key; did you mean `learning_rates`?"),
    ({"train__epochs": 1}, "train.epochs: unknown key; did you mean `train.optimizer.epochs`?"),
    ({"train__batch_size": 1}, "train.batch_size: unknown key; did you mean `train.optimizer.batch_tokens`?"),
    ({"teacher__context_tokens": 1}, "teacher.context_tokens: unknown key; did you mean `corpus.context_tokens`?"),
    ({"target": {"kind": "topk", "top_k": 5}}, "target.top_k: unknown key; did you mean `k`?"),
    (
        {"train__baseline": {"learning_rates": 1e-4}},
        "train.baseline.learning_rates: input should be a list, not 0.0001",
    ),
    (
        {"train__baseline": {"learning_rates": ["x"]}},
        "train.baseline.learning_rates[0]: input should be a number, not 'x'",
    ),
    (
        {"train__lora": {"target_modules": 5}},
        "train.lora.target_modules: input should be a list or 'all-linear', not 5",
    ),
    ({"train__lora": {"target_modules": [5]}}, "train.lora.target_modules[0]: input should be a valid string, not 5"),
    (
        {"train__targets": {"others": [{"out": "x", "weight": "y"}]}},
        "train.targets.others[0].weight: input should be a number or a list, not 'y'",
    ),
    (
        {"train__targets": {"others": [{"out": "x", "weight": [[0]]}]}},
        "train.targets.others[0].weight[0]: item 2 is missing",
    ),
    (
        {"train__where": {"mean_entropy": [1, 2, 3]}},
        "train.where.mean_entropy: input should be a list of at most 2 item(s), not [1, 2, 3]",
    ),
    (
        {"train__baseline": {"retention_weight": [True]}},
        "train.baseline.retention_weight: input should be a number, not [True]",
    ),
    (
        {"teacher__vllm": {"enforce_eager": "maybe"}},
        "teacher.vllm.enforce_eager: input should be true or false, not 'maybe'",
    ),
    ({"cluster__workers": 2.5}, "cluster.workers: input should be a whole number, not 2.5"),
    ({"cluster__workers": "two"}, "cluster.workers: input should be a whole number, not 'two'"),
    ({"train__balance": {"shares": 5}}, "train.balance.shares: input should be a section with keys or 'equal', not 5"),
]


@pytest.mark.parametrize(("changes", "problem"), ONE_PROBLEM, ids=[problem for _, problem in ONE_PROBLEM])
def test_one_mistake_is_one_problem_in_the_words_of_a_job_file(tmp_path, changes, problem):
    path = written(tmp_path, changed(**changes))
    with pytest.raises(JobInvalid) as caught:
        load_job(path, check_paths=False)
    assert re.fullmatch(rf"{re.escape(str(path))}: (line \d+, )?{re.escape(problem)}", str(caught.value)), str(
        caught.value
    )


def test_an_empty_value_is_no_word_of_python(tmp_path):
    text = "name: a\nout: b\nteacher: {model: }\ncorpus: {sources: [" + json.dumps(SOURCE) + "]}\n"
    with pytest.raises(JobInvalid, match=r"line 3, teacher\.model: input should be a valid string, not null$"):
        load_job(written(tmp_path, text), check_paths=False)


def test_line_is_that_of_the_key(tmp_path):
    text = "name: a\nout: b\nteacher:\n  model: m\n  fold: 3\ncorpus:\n  sources: []\n"
    with pytest.raises(JobInvalid, match=r"line 5, teacher\.fold: unknown key.*line 7, corpus\.sources"):
        load_job(written(tmp_path, text))


@pytest.mark.parametrize("target", [{"tau": "1/8"}, {"kind": "threshold", "tau": 1 / 8}])
def test_target_that_names_no_kind_is_a_threshold(tmp_path, target):
    job = load_job(written(tmp_path, changed(target=target)), check_paths=False)
    assert job.target == ThresholdSketch(tau=1 / 8)


def test_missing_key_names_the_section_that_lacks_it(tmp_path):
    text = "name: a\nout: b\nteacher: {model: m}\n# the texts\ncorpus:\n  context_tokens: 64\n"
    with pytest.raises(JobInvalid, match=r"job\.yaml: line 5, corpus: `sources` is missing$"):
        load_job(written(tmp_path, text))


def test_missing_section_has_no_line(tmp_path):
    job = changed()
    del job["teacher"]
    with pytest.raises(JobInvalid, match=r"job\.yaml: the top-level key `teacher` is missing$"):
        load_job(written(tmp_path, job))


def test_key_that_is_merged_in_is_named_in_full(tmp_path):
    sources = "teacher: &t {model: m}\ncorpus: {sources: []}\n"
    text = f"name: a\nout: b\n{sources}train: {{optimizer: {{<<: {{epochs: -1}}}}}}\n"
    with pytest.raises(JobInvalid, match=r"line 5, train\.optimizer\.epochs: "):
        load_job(written(tmp_path, text))


def test_type_that_a_value_might_have_is_no_part_of_its_place(tmp_path):
    job = changed(train__targets={"others": [{"out": "x", "weight": -1}]})
    with pytest.raises(
        JobInvalid, match=r"train\.targets\.others\[0\]\.weight: input should be greater than or equal to 0"
    ):
        load_job(written(tmp_path, job), check_paths=False)


def test_default_that_does_not_fit_the_file_is_named_by_its_key(tmp_path):
    job = changed(corpus__context_tokens=80)
    with pytest.raises(JobInvalid, match=r"job\.yaml: evaluate\.sample_tokens: with prompt_tokens makes 120, more"):
        load_job(written(tmp_path, job), check_paths=False)


def test_output_of_another_scheme_is_refused_for_other_jobs_too(tmp_path):
    job = changed(train__targets={"others": [{"out": "gs://bucket/run"}]})
    with pytest.raises(JobInvalid, match=r"train\.targets\.others\[0\]\.out: must be a local folder"):
        load_job(written(tmp_path, job), check_paths=False)


@pytest.mark.parametrize("text", [b"", b"- a", b"name: 3", b"name: [", b"\xff", b"out: x"])
def test_values_of_what_is_no_job_file_are_none(text):
    assert parse_values(text) is None


def test_values_of_a_job_file_of_another_version_are_read():
    assert parse_values(b"name: a\nfuture: 1\n") == {"name": "a", "future": 1}


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.csv", "polars.read_csv('a.csv').write_parquet("),
        ("a.CSV.gz", "polars.read_csv('a.csv').write_parquet("),
        ("a.tsv", "polars.read_csv('a.tsv', separator='\\t').write_parquet("),
        ("a.json", "if each line of a .json file is one object, set `format: jsonl`; else convert it"),
        ("a.arrow", "`format: datasets`"),
    ],
)
@pytest.mark.parametrize("uri", ["{}", "*{}"])
def test_source_of_a_kind_that_is_not_read_is_refused_by_its_ending_with_the_way_out(tmp_path, name, remedy, uri):
    (tmp_path / name).write_bytes(b"a,b\n")
    (tmp_path / "model").mkdir()
    model = str(tmp_path / "model")
    job = changed(corpus__sources__0__uri=str(tmp_path / uri.format(name)), teacher__model=model)
    with pytest.raises(JobInvalid) as caught:
        load_job(written(tmp_path, job))
    assert caught.value.exit_code == 2
    assert f"line 7, corpus.sources[0].uri: {tmp_path}" in str(caught.value)
    assert remedy in str(caught.value)
    job["corpus"]["sources"][0]["format"] = "jsonl"
    load_job(written(tmp_path, job))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    job["corpus"]["sources"][0].update(format="auto", uri=str(tmp_path / name))
    load_job(written(tmp_path, job))


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tales.txt").write_text("One.")
    (tmp_path / "model").mkdir()
    job = load_job(
        written(tmp_path, changed(out="~/runs/night", corpus__sources__0__uri="~/tales.txt", teacher__model="~/model"))
    )
    assert (job.out, job.corpus.sources[0].uri) == (f"{tmp_path}/runs/night", f"{tmp_path}/tales.txt")


def test_encoding_that_there_is_not_is_refused(tmp_path):
    for name in ("latin-27", "base64"):
        with pytest.raises(JobInvalid, match=rf"sources\[0\]\.encoding: '{name}' is not an encoding of text, such as"):
            load_job(written(tmp_path, changed(corpus__sources__0__encoding=name)), check_paths=False)


def test_configuration_of_what_is_no_data_set_is_refused(tmp_path):
    job = changed(corpus__sources__0__configuration="raw")
    with pytest.raises(JobInvalid, match=r"sources\[0\]\.configuration: .* set `format: datasets`"):
        load_job(written(tmp_path, job), check_paths=False)
    job["corpus"]["sources"][0]["format"] = "datasets"
    assert load_job(written(tmp_path, job), check_paths=False).corpus.sources[0].configuration == "raw"


def test_a_list_whose_items_are_wrong_is_not_also_called_empty(tmp_path):
    with pytest.raises(JobInvalid) as caught:
        load_job(written(tmp_path, changed(corpus__sources__0__license="Mine")), check_paths=False)
    assert "at least 1 item" not in str(caught.value)
    with pytest.raises(JobInvalid, match="at least 1 item"):
        load_job(written(tmp_path, changed(corpus__sources=[])), check_paths=False)
