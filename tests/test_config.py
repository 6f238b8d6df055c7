import pytest
from pydantic import ValidationError

from softshard.config import ClusterSettings, CorpusSettings, Job, TeacherSettings, digest_of


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_digest_of_settings_is_that_of_their_values():
    assert digest_of(ClusterSettings(workers=2)) == digest_of({"max_attempts": 3, "scheduler": None, "workers": 2})


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
