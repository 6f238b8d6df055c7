"""A style teacher in vLLM: its adapter is merged into the weights, and a canary proves that it is served."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from fakes.tiny_decoders import VOCAB, dense, direct_logprobs, open_vllm, some_sequences
from softshard.config import FullSketch, TeacherSettings
from softshard.errors import AdapterNotApplied
from softshard.teacher.engines import open_teacher, teacher_identity


def test_an_adapter_is_in_force_and_agrees_with_the_transformers_engine(tiny_model, adapter):
    sequences = some_sequences()
    teacher = open_vllm(tiny_model, adapters=(adapter,), digests=("a",))
    ours, _ = teacher.score(sequences, sketch=FullSketch(kind="full"), seed=0)
    teacher.close()
    settings = TeacherSettings(model="m", device="cpu")
    identity = teacher_identity(settings, context_tokens=96, weights="w", adapters=["a"])
    other = open_teacher(tiny_model, adapters=(adapter,), identity=identity, device="cpu", vocab_size=VOCAB)
    theirs, _ = other.score(sequences, sketch=FullSketch(kind="full"), seed=0)
    for one, two, base in zip(ours, theirs, direct_logprobs(tiny_model, sequences), strict=True):
        np.testing.assert_allclose(dense(one), dense(two), atol=1e-4)
        assert np.abs(dense(one) - base).max() > 1e-2


def test_an_engine_that_serves_the_base_is_refused(tiny_model, adapter, tmp_path):
    copy = tmp_path / "fold-0"
    shutil.copytree(adapter, copy)
    open_vllm(tiny_model, adapters=(copy,), digests=("a",)).close()
    (merged,) = (tmp_path / ".merged").iterdir()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(merged)
    with pytest.raises(AdapterNotApplied, match=r"shows -?0% of the adapter's effect"):
        open_vllm(tiny_model, adapters=(copy,), digests=("a",))
