"""Sketches that were made inside vLLM against a direct forward pass of transformers, at float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fakes.tiny_decoders import (
    FAMILIES,
    SPANS,
    VOCAB,
    dense,
    direct_logprobs,
    drawn,
    open_vllm,
    save_decoder,
    some_sequences,
)
from softshard.config import FullSketch, TeacherSettings, ThresholdSketch
from softshard.models import load_tokenizer
from softshard.sketch.types import TokenSequence
from softshard.teacher.engines import open_teacher, teacher_identity

NEAR = 1e-4
"""Nats."""
TAU = 1 / 12
SMOLLM2 = Path(__file__).parents[2] / ".cache/materials/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module", params=FAMILIES)
def scored(request, tmp_path_factory):
    """Sequences, their log-probabilities by a direct pass, and what the engine made of them at once."""
    folder = save_decoder(tmp_path_factory.mktemp("family") / request.param, request.param)
    sequences = some_sequences(spans=SPANS)
    # Small chunks of rows and pieces of 32 tokens: every seam that a long sequence has is in these short ones.
    teacher = open_vllm(folder, max_num_batched_tokens=32, max_num_seqs=4, chunk_rows=16)
    sketches = (FullSketch(kind="full"), ThresholdSketch(tau=TAU, draws=3), FullSketch(kind="full", temperature=2.0))
    results = teacher.score_each(sequences, sketches=sketches, seed=5)
    teacher.close()
    return sequences, direct_logprobs(folder, sequences), results


def test_log_probabilities_of_the_whole_vocabulary_agree(scored):
    sequences, expected, ((full, sums), _, _) = scored
    assert sums.num_labels == sum(sequence.num_labels for sequence in sequences)
    for sequence, targets, logprobs in zip(sequences, full, expected, strict=True):
        assert targets.num_labels == sequence.num_labels == len(logprobs)
        assert (targets.head_count == VOCAB).all()
        np.testing.assert_allclose(dense(targets), logprobs, atol=NEAR)
        labels = logprobs[np.arange(len(logprobs)), sequence.labels]
        np.testing.assert_allclose(targets.label_logprob, labels, atol=NEAR)
        np.testing.assert_allclose(targets.entropy, -(np.exp(logprobs) * logprobs).sum(1), atol=NEAR)


def test_the_head_is_the_same_wherever_noise_cannot_decide(scored):
    _, expected, (_, (sketched, _), _) = scored
    for targets, logprobs in zip(sketched, expected, strict=True):
        clear = np.abs(logprobs - np.log(TAU)) > NEAR
        head = dense(targets) > -np.inf
        np.testing.assert_array_equal(head[clear], (logprobs > np.log(TAU))[clear])
        np.testing.assert_allclose(dense(targets)[head], logprobs[head], atol=NEAR)
        np.testing.assert_allclose(targets.tail_mass, np.where(head, 0, np.exp(logprobs)).sum(1), atol=NEAR)


def test_temperature_divides_the_logits(scored):
    _, expected, (_, _, (warm, _)) = scored
    for targets, logprobs in zip(warm, expected, strict=True):
        halved = logprobs / 2
        np.testing.assert_allclose(dense(targets), halved - np.logaddexp.reduce(halved, 1)[:, None], atol=NEAR)


def test_tail_tokens_are_drawn_as_often_as_they_are_likely(tmp_path):
    folder = save_decoder(tmp_path / "model", "Qwen2")
    sequences = some_sequences((20, 33))
    expected = np.concatenate(direct_logprobs(folder, sequences))
    teacher = open_vllm(folder)
    counts, num_draws = np.zeros_like(expected), 0
    for seed in range(24):
        scored, _ = teacher.score(sequences, sketch=ThresholdSketch(tau=TAU, draws=64), seed=seed)
        first = 0
        for targets in scored:
            labels = np.arange(first, first + targets.num_labels)
            np.add.at(counts, (np.repeat(np.tile(labels, 64), targets.tail_count), targets.tail_ids), 1)
            first += targets.num_labels
        num_draws += 64
    teacher.close()
    tail = expected < np.log(TAU) - NEAR
    frequency = np.exp(expected[tail]) / TAU
    # Each draw is a Bernoulli trial: 15,000 of them, 1,536 draws each, all within five and a half deviations.
    deviation = np.sqrt(np.maximum(frequency * (1 - frequency), 1 / num_draws) / num_draws)
    scores = (counts[tail] / num_draws - frequency) / deviation
    assert len(scores) > 10_000
    assert np.abs(scores).max() < 5.5
    assert abs(scores.mean()) < 0.05
    assert counts[~tail & (expected > np.log(TAU) + NEAR)].sum() == 0


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the demo's model is not there; `make test` fetches it")
def test_both_engines_agree_on_a_real_model():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    ids = np.array(load_tokenizer(SMOLLM2).encode([text])[0][:700], dtype=np.int32)
    sequences = [
        TokenSequence(
            sequence_id=str(start),
            document_id="d",
            source="s",
            style="s",
            group="g",
            start=start,
            token_ids=ids[start : start + 350],
            label_spans=((1, len(ids[start : start + 350])),),
        )
        for start in (0, 349)
    ]
    size = load_tokenizer(SMOLLM2).vocab_size
    settings = TeacherSettings(model="m", device="cpu")
    identity = teacher_identity(settings, context_tokens=512, weights="w", adapters=[])
    other = open_teacher(SMOLLM2, adapters=(), identity=identity, device="cpu", vocab_size=size)
    teacher = open_vllm(SMOLLM2, vocab_size=size, context=512, max_num_batched_tokens=256)
    ours, sums = teacher.score(sequences, sketch=ThresholdSketch(), seed=1)
    theirs, other_sums = other.score(sequences, sketch=ThresholdSketch(), seed=1)
    teacher.close()
    assert sums.num_labels == other_sums.num_labels
    assert sums.squared_error == pytest.approx(other_sums.squared_error, rel=1e-3)
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.label_logprob, two.label_logprob, atol=NEAR)
        np.testing.assert_allclose(one.entropy, two.entropy, atol=NEAR)
        assert np.isin(drawn(one), drawn(two)).mean() > 0.97
        same = np.array_equal(one.head_count, two.head_count)
        if same:
            np.testing.assert_allclose(one.head_logprobs, two.head_logprobs, atol=NEAR)
        assert same or np.abs(one.head_count - two.head_count).sum() <= 2
