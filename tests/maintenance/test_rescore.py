"""Stored targets against a second scoring: what must be accepted, and what must not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from softshard.cli import main
from softshard.config import ThresholdSketch, TopkSketch
from softshard.maintenance import rescore as module
from softshard.maintenance.rescore import compare, rescore
from softshard.shard.manifest import read_manifest
from softshard.sketch.types import SequenceTargets
from softshard.telemetry import SilentReporter

TAU = 1 / 8
SKETCH = ThresholdSketch(tau=TAU, step=0.05)


def two_labels(*, second=(0.4, 0.2, 0.13)):
    """Targets of two labels before they are stored: heads of two and of three tokens."""
    probabilities = np.array([0.5, 0.25, *second])
    count = np.array([2, len(second)], dtype=np.int32)
    return SequenceTargets(
        label_logprob=np.array([-1.0, -2.5], dtype=np.float32),
        entropy=np.array([1.0, 2.0], dtype=np.float32),
        tail_mass=np.array([0.25, 1 - sum(second)], dtype=np.float32),
        head_count=count,
        tail_count=np.zeros(2, dtype=np.int32),
        head_ids=np.array([7, 3, 9, 1, 4][: count.sum()], dtype=np.int32),
        head_logprobs=np.log(probabilities).astype(np.float32),
        tail_ids=np.zeros(0, dtype=np.int32),
    )


def stored(targets, **changes):
    """As a part would have them: heads in steps below the first, the label on its grid."""
    firsts = np.repeat(targets.head_logprobs[[0, targets.head_count[0]]], targets.head_count)
    steps = np.rint((targets.head_logprobs - firsts) / 0.05) * 0.05
    label = np.rint(targets.label_logprob * 16) / 16
    return replace(targets, head_logprobs=steps.astype(np.float32), label_logprob=label.astype(np.float32), **changes)


def beyond(one, other, sketch=SKETCH, noise=1e-3):
    return compare(one, other, sketch, noise_nats=noise).num_beyond


def test_quantisation_alone_is_accepted():
    targets = two_labels()
    assert beyond(stored(targets), targets) == 0
    assert beyond(stored(targets), targets, TopkSketch(kind="topk", k=3)) == 0


def test_a_label_or_a_weight_off_by_more_is_counted():
    targets = two_labels()
    moved = targets.label_logprob + np.array([0, 0.05], dtype=np.float32)
    assert beyond(stored(targets), replace(targets, label_logprob=moved)) == 1
    assert beyond(stored(targets), replace(targets, label_logprob=moved), noise=0.05) == 0
    heavier = targets.head_logprobs.copy()
    heavier[1] += 0.2
    assert beyond(stored(targets), replace(targets, head_logprobs=heavier)) == 1


def test_only_an_entry_at_the_border_may_be_missing():
    whole, without = two_labels(), two_labels(second=(0.4, 0.2))
    at_border = two_labels(second=(0.4, 0.2, 0.1251))
    assert beyond(stored(at_border), without) == 0
    assert beyond(stored(without), at_border) == 0
    assert beyond(stored(two_labels(second=(0.4, 0.3, 0.2))), two_labels(second=(0.4, 0.3))) == 1
    swapped = replace(whole, head_ids=np.array([7, 3, 9, 2, 4], dtype=np.int32))
    assert beyond(stored(whole), swapped) == 2


def test_a_finished_job_is_as_its_teacher_says(finished, capsys):
    assert main(["verify", str(finished), "--against-teacher", "7", "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against_teacher"]
    assert found["engines"] == ["transformers"]
    assert found["num_sequences"] == 7
    assert found["num_labels"] > 100
    assert 0 < found["label_nats_mean"] < found["label_nats_max"] <= 1 / 32 + 1e-4
    assert found["noise_nats"] < 1e-4 < found["allowed_nats"]
    assert found["num_beyond"] == 0
    assert main(["verify", str(finished), "--against-teacher", "1", "--quiet"]) == 0
    assert "the stored targets agree with the teacher" in capsys.readouterr().out


def test_all_sequences_are_compared_where_more_are_asked_for(finished):
    found = rescore(str(finished), SilentReporter(), num=10_000)
    assert found.num_sequences == sum(part.num_sequences for part in read_manifest(finished / "targets").parts)
    assert found.num_beyond == 0


def test_another_teacher_ends_with_3(finished, tmp_path, monkeypatch, capsys):
    from fakes.tiny import save_tiny_model

    other = save_tiny_model(tmp_path / "other", seed=1)
    real = module.open_teacher
    monkeypatch.setattr(module, "open_teacher", lambda folder, *, adapters, **named: real(other, adapters=(), **named))
    assert main(["verify", str(finished), "--against-teacher", "3", "--quiet"]) == 3
    assert "differ by more than that" in capsys.readouterr().out


def test_a_model_that_has_changed_is_refused(finished, monkeypatch):
    from softshard.errors import ModelInvalid
    from softshard.output.workspace import Model

    monkeypatch.setattr(Model, "weights", "another")
    with pytest.raises(ModelInvalid, match="not the model that the targets were made with"):
        rescore(str(finished), SilentReporter(), num=1)


def test_an_engine_without_a_teacher_to_compare_with_is_refused(finished, capsys):
    assert main(["verify", str(finished), "--engine", "vllm"]) == 2
    assert "needs --against-teacher N" in capsys.readouterr().err
