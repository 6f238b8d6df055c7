import pytest
from pydantic import ValidationError

from softshard.config import (
    SKETCH_KINDS,
    AdaptiveSettings,
    ClusterSettings,
    CorpusSettings,
    Job,
    NucleusSketch,
    TeacherSettings,
    ThresholdSketch,
    parse_sketch,
    sketch_class,
)
from softshard.records.digest import canonical_digest


def test_digest_does_not_depend_on_the_order_of_keys():
    assert canonical_digest({"a": 1, "b": [2]}) == canonical_digest({"b": [2], "a": 1})
    assert canonical_digest({"a": 1}) != canonical_digest({"a": 2})


def test_digest_of_settings_is_that_of_their_values():
    assert canonical_digest(AdaptiveSettings(maximum=2)) == canonical_digest({"minimum": 0, "maximum": 2})


def test_settings_cannot_be_changed_and_take_no_unknown_key():
    with pytest.raises(ValidationError, match="frozen"):
        ClusterSettings().workers = 3
    with pytest.raises(ValidationError, match="wokers"):
        ClusterSettings(wokers=3)


def test_every_setting_says_what_it_means():
    undocumented = [
        f"{model.__name__}.{name}"
        for model in (ClusterSettings, CorpusSettings, TeacherSettings)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert undocumented == []
    assert all(
        "default" in part or name in Job.model_json_schema()["required"]
        for name, part in Job.model_json_schema()["properties"].items()
    )


@pytest.mark.parametrize("other", [{"budget_bytes": 25}, {"max_angle_degrees": 10}])
def test_tau_is_decided_in_one_way_alone(other):
    assert not ThresholdSketch(**other).is_resolved
    with pytest.raises(ValidationError, match="cannot be given together"):
        ThresholdSketch(tau=1 / 24, **other)


@pytest.mark.parametrize("values", [{}, {"tau": "1/50", "draws": 3}, {"budget_bytes": 25}, {"max_angle_degrees": 10}])
def test_what_a_sketch_is_dumped_as_makes_the_same_sketch(values):
    sketch = ThresholdSketch(**values)
    assert ThresholdSketch(**sketch.model_dump(mode="json")) == sketch


def a_job(target, train):
    source = {"name": "a", "uri": "a.txt", "style": "s", "license": "MIT", "rights_basis": "owned"}
    return Job(name="job", out="out", corpus={"sources": [source]}, teacher={"model": "m"}, target=target, train=train)


def test_temperature_at_load_is_refused_where_it_is_not_exact():
    assert a_job({"kind": "full"}, {"temperature": 2}).train.temperature == 2
    assert a_job({"kind": "topk"}, {"temperature": 2, "truncated": "renormalise"}).train.temperature == 2
    for target in ({"kind": "threshold"}, {"kind": "topk"}, {"kind": "nucleus"}):
        with pytest.raises(ValidationError, match=r"target\.temperature"):
            a_job(target, {"temperature": 2})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"target": {"tau": 2**-15 / 2}}, "target.threshold.tau"),
        ({"out": "gs://bucket/run"}, "must be a local folder or s3://bucket/prefix"),
        ({"train": {"revision": "main"}}, "revision: has no `train.model`"),
        ({"evaluate": {"sample_tokens": 600}}, "evaluate.sample_tokens: with prompt_tokens makes 624, more"),
    ],
)
def test_settings_refuse_from_python_what_a_job_file_may_not_say(values, problem):
    job = a_job({}, {}).model_dump(mode="json")
    with pytest.raises(ValidationError) as caught:
        Job.model_validate({**job, **values})
    assert problem in str(caught.value)


@pytest.mark.parametrize("values", [{"budget_bytes": 25}, {"max_angle_degrees": 10}, {"tau": "1/8", "draws": 2}, {}])
def test_target_without_a_kind_is_a_threshold(values):
    assert a_job(values, {}).target == parse_sketch(values) == ThresholdSketch(**values)


def test_schema_takes_a_target_without_a_kind_as_a_threshold_alone():
    definitions = Job.model_json_schema()["$defs"]
    optional = [
        name
        for name, model in definitions.items()
        if name.endswith("Sketch") and "kind" not in model.get("required", ())
    ]
    assert optional == ["ThresholdSketch"]
    assert definitions["ThresholdSketch"]["properties"]["kind"]["default"] == "threshold"


def test_unknown_kind_names_the_known_ones():
    for refused in (lambda: sketch_class("magic"), lambda: parse_sketch({"kind": "magic"})):
        with pytest.raises(ValueError, match=r"magic.*threshold.*topk.*nucleus.*full"):
            refused()


def test_kind_that_leaves_tokens_out_is_biased_and_one_that_covers_all_leaves_none():
    for kind in SKETCH_KINDS.values():
        assert kind.leaves_ghost == (not kind.covers_vocabulary and not kind.samples_tail)
        assert not (kind.leaves_ghost and kind.is_unbiased)


def test_stored_settings_make_the_same_sketch():
    sketch = NucleusSketch(kind="nucleus", mass=0.9, max_entries=100, temperature=2.0, step=0.1)
    assert parse_sketch(sketch.model_dump(mode="json")) == sketch
