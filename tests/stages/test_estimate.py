"""What the student's trainings will take, worked out by hand, and what is said of a corpus that is too small."""

from __future__ import annotations

import pytest

from softshard.config import Job
from softshard.stages.estimate import estimate_student, weigh_corpus

SOURCE = {"name": "s", "uri": "s.txt", "style": "plain", "license": "MIT", "rights_basis": "owned"}


def job(*, teacher=None, train=None):
    sections = {
        "teacher": {"model": "m", "device": "cpu", **(teacher or {})},
        "train": {"device": "cpu", **(train or {})},
    }
    return Job.model_validate({"name": "a", "out": "o", "corpus": {"sources": [SOURCE]}, **sections})


OPTIMIZER = {"batch_tokens": 1000, "epochs": 2}


def test_the_hours_of_training_and_evaluation_are_tokens_over_speed():
    settings = {"optimizer": OPTIMIZER, "baseline": {"learning_rates": [1e-3, 3e-3]}}
    found = estimate_student(job(train=settings), train_tokens=9_500, test_tokens=700, tokens_per_second=10.0)
    assert found.steps == 20
    # Three trainings of two epochs, each token as much as three scored ones.
    assert found.training_hours == pytest.approx(3 * 2 * 9_500 * 3 / 10 / 3600)
    # The hold-out after each of the three, then for base, baseline and adapter.
    assert found.evaluation_hours == pytest.approx(6 * 700 / 10 / 3600)


def test_retention_costs_its_batch_in_every_step_and_a_pass_of_the_base():
    settings = {
        "optimizer": OPTIMIZER,
        "baseline": None,
        "retention": {"sources": [SOURCE], "batch_tokens": 100, "weight": 0.5},
    }
    found = estimate_student(job(train=settings), train_tokens=10_000, test_tokens=0, tokens_per_second=1.0)
    assert found.training_hours == pytest.approx((2 * 10_000 * 3 + 20 * 100 * 4) / 3600)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train": {"model": "another"}}, "the student is another model"),
        ({"teacher": {"engine": "vllm"}}, "the speed is that of vllm"),
        ({"train": {"device": "cuda"}}, "the speed is that of cpu, the student is trained on cuda"),
    ],
)
def test_a_time_that_is_not_known_is_no_time(settings, reason):
    found = estimate_student(job(**settings), train_tokens=9_500, test_tokens=700, tokens_per_second=10.0)
    assert (found.training_hours, found.evaluation_hours, found.not_measured) == (None, None, reason)


def test_a_hold_out_of_one_document_and_trainings_of_one_step_are_warned_of():
    small = job(
        teacher={"folds": 2, "optimizer": {"batch_tokens": 400, "epochs": 1}},
        train={"optimizer": {"batch_tokens": 1000, "epochs": 1}},
    )
    warnings = weigh_corpus(small, train_tokens=800, test_documents=1)
    assert [warning.split(",")[0].split(" on ")[0] for warning in warnings] == [
        "the hold-out is one document",
        "a training with `train.optimizer` is one step",
        "a training with `teacher.optimizer` is one step",
    ]
    assert weigh_corpus(small, train_tokens=4_000, test_documents=2) == []
