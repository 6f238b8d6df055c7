"""An engine in processes of its own: two that share each layer, and one that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest

from fakes.tiny_decoders import dense, direct_logprobs, open_vllm, save_decoder, some_sequences
from softshard.config import FullSketch, ThresholdSketch
from softshard.errors import EngineFailed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("qwen") / "model", "Qwen2")


def test_two_ranks_give_the_sketches_of_one(folder):
    sequences = some_sequences()
    teacher = open_vllm(folder, tensor_parallel_size=2, chunk_rows=16)
    (full, sums), (sketched, _) = teacher.score_each(
        sequences, sketches=(FullSketch(kind="full"), ThresholdSketch()), seed=0
    )
    teacher.close()
    alone = open_vllm(folder)
    expected, _ = alone.score(sequences, sketch=ThresholdSketch(), seed=0)
    alone.close()
    assert sums.num_labels == sum(sequence.num_labels for sequence in sequences)
    for targets, logprobs in zip(full, direct_logprobs(folder, sequences), strict=True):
        np.testing.assert_allclose(dense(targets), logprobs, atol=1e-4)
    for one, other in zip(sketched, expected, strict=True):
        np.testing.assert_array_equal(one.head_ids, other.head_ids)
        assert np.mean(one.tail_count == other.tail_count) > 0.98


def test_a_killed_engine_is_one_error_and_another_can_be_opened(folder):
    sequences = some_sequences()
    before = set(multiprocessing.active_children())
    teacher = open_vllm(folder, own_process=True)
    started = set(multiprocessing.active_children()) - before
    first, _ = teacher.score(sequences, sketch=ThresholdSketch(), seed=0)
    assert started
    for process in started:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="the vllm engine failed"):
        teacher.score(sequences, sketch=ThresholdSketch(), seed=0)
    again = open_vllm(folder)
    second, _ = again.score(sequences, sketch=ThresholdSketch(), seed=0)
    again.close()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.head_ids, other.head_ids)
