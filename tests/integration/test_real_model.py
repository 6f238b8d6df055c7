"""The demo's own model on a person's sentences: few tests, and the slowest. `make test` fetches the model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from softshard.config import FullSketch, TeacherSettings, ThresholdSketch
from softshard.models import load_tokenizer
from softshard.sketch.types import TokenSequence
from softshard.teacher.transformers_engine import TransformersTeacher, engine_identity

pytestmark = pytest.mark.real_model
CACHE = Path(os.environ.get("SOFTSHARD_MATERIALS", Path(__file__).parents[2] / ".cache/materials"))
FOLDER = CACHE / "SmolLM2-135M-Instruct"
VOCAB = 49152


@pytest.fixture(scope="module")
def sequences(texts):
    tokenizer = load_tokenizer(FOLDER)
    long = [*tokenizer.encode(texts), tokenizer.encode([" ".join(texts)])[0]]
    return [
        TokenSequence(
            sequence_id=f"{index:032d}",
            document_id=f"{index:032d}",
            source="s",
            style="s",
            group="g",
            start=0,
            token_ids=np.array([*ids, tokenizer.eos_id], dtype=np.int32),
            label_spans=((1, len(ids) + 1),),
        )
        for index, ids in enumerate(long)
    ]


@pytest.fixture(scope="module")
def direct(sequences):
    """[labels, VOCAB] log-probabilities of each sequence, float64, from a forward pass over it alone."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.from_numpy(one.token_ids.astype(np.int64))[None]).logits[0, :-1] for one in sequences]
    return [torch.log_softmax(each.double(), -1).numpy() for each in logits]


@pytest.fixture(scope="module")
def engine():
    settings = TeacherSettings(model="m", device="cpu", batch_tokens=512)
    identity = engine_identity(settings, context_tokens=512, weights="w", adapters=[])
    return TransformersTeacher(FOLDER, adapters=(), identity=identity, device="cpu", vocab_size=VOCAB)


def test_sketches_of_human_prose_agree_with_a_direct_forward_pass(sequences, direct, engine):
    settings = ThresholdSketch()
    scored, _ = engine.score(sequences, sketch=settings, seed=0)
    squared, expected, labels = 0.0, 0.0, 0
    for sequence, targets, logp in zip(sequences, scored, direct, strict=True):
        rows = np.arange(len(logp))
        np.testing.assert_allclose(targets.label_logprob, logp[rows, sequence.labels], atol=1e-3)
        head_rows = np.repeat(rows, targets.head_count)
        np.testing.assert_allclose(targets.head_logprobs, logp[head_rows, targets.head_ids], atol=1e-3)
        p = np.exp(logp)
        is_head = np.zeros(p.shape, dtype=bool)
        is_head[head_rows, targets.head_ids] = True
        wrong = is_head != (p >= settings.tau)
        assert np.all(np.abs(logp[wrong] - np.log(settings.tau)) < 1e-3)
        tail = np.where(is_head, 0, p)
        drawn = np.zeros(p.shape)
        drawn[np.repeat(rows, targets.tail_count), targets.tail_ids] = settings.tau
        assert np.all(np.abs(drawn.sum(1) - tail.sum(1)) < settings.tau * 1.001)
        squared += float(((drawn - tail) ** 2).sum())
        expected += float((tail * (settings.tau - tail)).sum())
        labels += len(p)
    assert labels > 500
    # A label has at most 25 tail entries, so its squared error lies between 0 and 25 tau^2 + tau. Labels draw
    # independently: Hoeffding's inequality, with a failure once in 10^6.
    widest = 25 * settings.tau**2 + settings.tau
    assert abs(squared - expected) / labels < widest * np.sqrt(np.log(2e6) / (2 * labels))


def test_full_sketch_has_the_entropy_and_the_mass_of_the_model(sequences, direct, engine):
    ((targets,), fidelity) = engine.score(sequences[:1], sketch=FullSketch(kind="full", step=0.05), seed=0)
    p = np.exp(direct[0])
    np.testing.assert_allclose(targets.entropy, -(p * direct[0]).sum(1), atol=1e-3)
    assert targets.head_count.tolist() == [VOCAB] * len(p)
    assert fidelity.kl_nats / fidelity.num_labels < 0.05**2 / 8
