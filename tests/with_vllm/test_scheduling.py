"""What vLLM makes of a batch, and what must not come of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fakes.tiny_decoders import SPANS, VOCAB, dense, drawn, open_vllm, save_decoder, some_sequences
from softshard.config import FullSketch, ThresholdSketch
from softshard.errors import EngineFailed, JobInvalid, LogitsInvalid, ModelInvalid
from softshard.teacher import vllm_engine, vllm_pooler
from softshard.teacher.vllm_pooler import SketchPooler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("llama") / "model", "Llama")


@pytest.fixture
def teacher(folder):
    opened = open_vllm(folder)
    yield opened
    opened.close()


def assert_same_but_for_noise(some, others):
    for one, other in zip(some, others, strict=True):
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=2e-5)
        np.testing.assert_array_equal(one.head_ids, other.head_ids)
        assert np.mean(one.tail_count == other.tail_count) > 0.98  # a running sum may move in its last bits
        assert np.isin(drawn(one), drawn(other)).mean() > 0.98


def test_batches_change_neither_random_numbers_nor_order(teacher):
    sequences = some_sequences()
    together, _ = teacher.score(sequences, sketch=ThresholdSketch(draws=2), seed=4)
    alone = [teacher.score([one], sketch=ThresholdSketch(draws=2), seed=4)[0][0] for one in reversed(sequences)]
    assert_same_but_for_noise(together, alone[::-1])
    others, _ = teacher.score(sequences, sketch=ThresholdSketch(draws=2), seed=5)
    assert np.isin(drawn(others[3]), drawn(together[3])).mean() < 0.9
    np.testing.assert_allclose(others[3].label_logprob, together[3].label_logprob, atol=2e-5)


def test_a_sequence_taken_in_pieces_has_the_same_targets(folder, teacher):
    sequences = some_sequences(first_labels=[1, 1, 1, 17, 5, 1])
    whole, sums = teacher.score(sequences, sketch=ThresholdSketch(), seed=4)
    teacher.close()
    pieces = open_vllm(folder, max_num_batched_tokens=17, max_num_seqs=3, chunk_rows=8)
    in_pieces, other_sums = pieces.score(sequences, sketch=ThresholdSketch(), seed=4)
    pieces.close()
    assert_same_but_for_noise(in_pieces, whole)
    assert other_sums.num_labels == sums.num_labels == sum(sequence.num_labels for sequence in sequences)
    assert other_sums.squared_error == pytest.approx(sums.squared_error, rel=1e-3)


def test_labels_with_context_between_them_have_the_targets_that_they_have_in_full(teacher):
    some = some_sequences(spans=SPANS)
    whole, _ = teacher.score(some_sequences(), sketch=ThresholdSketch(), seed=4)
    parts, sums = teacher.score(some, sketch=ThresholdSketch(), seed=4)
    assert sums.num_labels == sum(sequence.num_labels for sequence in some)
    for sequence, complete, part in zip(some, whole, parts, strict=True):
        rows = sequence.positions
        np.testing.assert_allclose(part.label_logprob, complete.label_logprob[rows], atol=2e-5)
        assert np.mean(part.tail_count == complete.tail_count[rows]) > 0.98
        tails = np.split(complete.tail_ids, np.cumsum(complete.tail_count)[:-1])
        assert np.isin(part.tail_ids, np.concatenate([tails[row] for row in rows])).mean() > 0.98


def test_context_is_never_projected(teacher, monkeypatch):
    sequences, projected = some_sequences(spans=SPANS), []
    real = vllm_pooler.sketch_rows

    def sketched(rows, **named):
        projected.append(len(rows))
        return real(rows, **named)

    monkeypatch.setattr(vllm_pooler, "sketch_rows", sketched)
    teacher.score(sequences, sketch=ThresholdSketch(), seed=4)
    assert sum(projected) == sum(sequence.num_labels for sequence in sequences) == 119


def test_a_sequence_may_be_as_long_as_the_engine_and_no_longer(teacher):
    (longest, longer) = some_sequences((96, 97))
    (targets,), _ = teacher.score([longest], sketch=ThresholdSketch(), seed=0)
    assert targets.num_labels == 95
    with pytest.raises(ModelInvalid, match="made for 96 tokens, a sequence has 97"):
        teacher.score([longer], sketch=ThresholdSketch(), seed=0)


def test_full_targets_are_refused_where_they_would_be_too_large(teacher, monkeypatch):
    monkeypatch.setattr(vllm_engine, "LARGEST_FULL", 40 * VOCAB)
    (small, large) = some_sequences((40, 41))
    (targets,), _ = teacher.score([small], sketch=FullSketch(kind="full"), seed=0)
    assert np.isfinite(dense(targets)).all()
    with pytest.raises(JobInvalid, match="12,300 entries, more than 12,000"):
        teacher.score([large], sketch=FullSketch(kind="full"), seed=0)


def test_broken_logits_are_named_by_sequence_and_position(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(tmp_path)
    sequences = some_sequences()
    for sequence in sequences:
        sequence.token_ids[sequence.token_ids == 7] = 8
    sequences[3].token_ids[50] = 7
    teacher = open_vllm(tmp_path, chunk_rows=16)
    # Attention multiplies what it masks by zero, so the NaN shows before the token, by a block of keys at most.
    with pytest.raises(LogitsInvalid, match=f"sequence {sequences[3].sequence_id}, position [345]") as caught:
        teacher.score(sequences, sketch=ThresholdSketch(), seed=0)
    assert caught.value.position <= 50
    (targets,), _ = teacher.score(sequences[:1], sketch=ThresholdSketch(), seed=0)  # the engine goes on
    assert np.isfinite(targets.label_logprob).all()
    teacher.close()


def test_an_engine_out_of_memory_ends_in_one_error(teacher, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_pooler, "sketch_rows", exhausted)
    with pytest.raises(EngineFailed, match="out of memory"):
        teacher.score(some_sequences((20,)), sketch=ThresholdSketch(), seed=0)


def test_memory_profile_takes_as_many_rows_as_a_chunk_has(monkeypatch):
    from vllm.pooling_params import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    monkeypatch.setattr(vllm_pooler, "get_tensor_model_parallel_rank", lambda: 0)
    seen, kinds = [], []
    real = vllm_pooler.sketch_rows

    def logits(states):
        seen.append(len(states))
        return torch.zeros(len(states), 10)

    def sketched(rows, **named):
        kinds.append(named["settings"].kind)
        return real(rows, **named)

    monkeypatch.setattr(vllm_pooler, "sketch_rows", sketched)
    # As vLLM profiles: many requests of a few tokens each, and nothing that is ours.
    counts = np.full(64, 2)
    metadata = PoolingMetadata(
        prompt_lens=torch.from_numpy(counts),
        prompt_token_ids=None,
        prompt_token_ids_cpu=torch.zeros((64, 2), dtype=torch.int64),
        pooling_params=[PoolingParams(task="token_classify")] * 64,
        pooling_states=[PoolingStates() for _ in range(64)],
    )
    metadata.build_pooling_cursor(counts, seq_lens_cpu=torch.from_numpy(counts), device=torch.device("cpu"))
    outputs = SketchPooler(logits, chunk_rows=48, vocab_size=10)(torch.zeros(128, 4), metadata)
    assert len(outputs) == 64
    assert seen == [48]
    assert kinds == ["threshold", "full"]
