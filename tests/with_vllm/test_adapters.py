"""A style teacher in vLLM: its adapter is merged into the weights, and a canary proves that it is served."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tiny_decoders import VOCAB, dense, direct_logprobs, open_vllm, some_sequences
from transformers import AutoModelForCausalLM

from softshard.config import FullSketch, LoraSettings, TeacherSettings
from softshard.errors import AdapterNotInForce
from softshard.models import load_model
from softshard.teacher.engines import identity_of, open_teacher
from softshard.train.lora import attach_lora, save_adapter


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fold-0"
    folder.mkdir()
    model = attach_lora(load_model(tiny_model, dtype=torch.float32, device="cpu"), LoraSettings(rank=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for name, content in save_adapter(model).items():
        (folder / name).write_bytes(content)
    return folder


def test_an_adapter_is_in_force_and_agrees_with_the_transformers_engine(tiny_model, adapter):
    sequences = some_sequences()
    teacher = open_vllm(tiny_model, adapters=(adapter,), digests=("a",))
    ours, _ = teacher.score(sequences, sketch=FullSketch(kind="full"), seed=0)
    teacher.close()
    settings = TeacherSettings(model="m", device="cpu")
    identity = identity_of(settings, context_tokens=96, weights="w", adapters=["a"])
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
    with pytest.raises(AdapterNotInForce, match=r"shows -?0% of what the adapter changes"):
        open_vllm(tiny_model, adapters=(copy,), digests=("a",))
