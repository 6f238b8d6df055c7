"""What has to be the same on a CUDA device as on a CPU: sketches, teachers, a whole job. Skipped where there is none.

`SOFTSHARD_TEST_DEVICE=cpu` runs the same tests on the CPU, a rehearsal of the tests that says nothing of a GPU.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from softshard.cli import main
from softshard.config import (
    FullSketch,
    NucleusSketch,
    TeacherSettings,
    ThresholdSketch,
    TopkSketch,
    VllmSettings,
)
from softshard.errors import LogitsInvalid
from softshard.shard.manifest import read_manifest
from softshard.sketch.philox import draw_uniforms
from softshard.sketch.reduce import sketch_rows
from softshard.sketch.types import TokenSequence
from softshard.teacher.engines import open_teacher, teacher_identity

TAU = 1 / 24
VOCAB = 300
CLEAR = 1e-4
"""Nats from a border within which rounding may decide."""
ALMOST_ALL = 0.98
"""Of the tail entries; running sums move in their last bits, and with them one entry in some hundred."""
NEAR = {"transformers": 1e-4, "vllm": 1e-3}
"""Nats; vLLM's attention at float32 is Triton's, and .001 is what `verify --against-teacher` allows two engines."""
VLLM = {"kv_cache_gib": 0.25, "max_num_batched_tokens": 512, "gpu_memory_utilization": 0.3}


DEVICE = os.environ.get("SOFTSHARD_TEST_DEVICE", "cuda")
if DEVICE.startswith("cuda") and not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible to torch", allow_module_level=True)


@pytest.fixture(scope="module")
def device():
    return DEVICE


@pytest.fixture
def counted(device):
    """The device, if it counts its memory."""
    if not device.startswith("cuda"):
        pytest.skip("torch counts the memory of CUDA devices alone")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return device


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request):
    if request.param == "vllm" and find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    return request.param


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """A random model whose attention heads are large enough for vLLM, with the tokenizer of the tiny one."""
    folder = save_model(tmp_path_factory.mktemp("gpu") / "model", hidden_size=128, intermediate_size=96)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def save_model(folder, *, hidden_size, intermediate_size):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def random_logits(rows, vocab, *, dtype=torch.float32, padding=21):
    """Of which the last columns stand for no token and are large."""
    logits = torch.randn(rows, vocab + padding, generator=torch.Generator().manual_seed(rows)) * 2.5
    logits[:, vocab:] += 20
    return logits.to(dtype)


def sketch(logits, settings, *, vocab, first=0):
    """Of rows that are the labels `first`, `first` + 1, ... of a sequence, wherever the logits are."""
    rows = len(logits)
    return sketch_rows(
        logits,
        labels=((first + torch.arange(rows)) * 7 % vocab).to(logits.device),
        uniforms=uniforms_of(rows, settings, first=first),
        settings=settings,
        vocab_size=vocab,
        places=[("seq", first + row) for row in range(rows)],
    )


def uniforms_of(rows, settings, *, first=0):
    draws = settings.num_draws
    return draw_uniforms(np.arange(first, first + rows), seed=3, sequence_id="seq", draws=draws)


def exact(logits, *, vocab):
    """[rows, vocab] float64 log-probabilities."""
    return torch.log_softmax(logits[:, :vocab].double(), 1).numpy()


def heads(targets, *, vocab):
    """[labels, vocab] log-probabilities of the head, -inf beside it."""
    dense = np.full((targets.num_labels, vocab), -np.inf)
    dense[np.repeat(np.arange(targets.num_labels), targets.head_count), targets.head_ids] = targets.head_logprobs
    return dense


def drawn(targets):
    """Each entry of a tail as one number: its label, its draw and its token."""
    return np.repeat(np.arange(len(targets.tail_count)), targets.tail_count) * 2**20 + targets.tail_ids


def assert_same(ours, theirs, *, logprobs, settings):
    """The same targets but for the rounding of two devices; `logprobs` decide what is close to a head's border."""
    for name in ("label_logprob", "entropy", "tail_mass"):
        clear = (ours.head_count == theirs.head_count) if name == "tail_mass" else slice(None)
        np.testing.assert_allclose(getattr(ours, name)[clear], getattr(theirs, name)[clear], atol=1e-5)
    one, two = (heads(targets, vocab=logprobs.shape[1]) for targets in (ours, theirs))
    least = np.where(two > -np.inf, logprobs, np.inf).min(1, keepdims=True)
    border = np.log(settings.tau) if settings.kind == "threshold" else least
    differs = (one > -np.inf) != (two > -np.inf)
    assert (np.abs(logprobs - border)[differs] < CLEAR).all()
    both = (one > -np.inf) & (two > -np.inf)
    assert both.sum() > 0.999 * len(theirs.head_ids)
    np.testing.assert_allclose(one[both], two[both], atol=1e-5)
    if len(theirs.tail_ids):
        assert np.isin(drawn(ours), drawn(theirs)).mean() > ALMOST_ALL
        assert np.isin(drawn(theirs), drawn(ours)).mean() > ALMOST_ALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        ThresholdSketch(draws=2),
        TopkSketch(kind="topk", k=40),
        NucleusSketch(kind="nucleus", mass=0.9),
        FullSketch(kind="full"),
    ],
    ids=lambda settings: settings.kind,
)
def test_sketches_of_the_same_logits_are_those_of_the_cpu(device, settings, dtype):
    logits = random_logits(200, 5_003, dtype=dtype)
    ours, measured = sketch(logits.to(device), settings, vocab=5_003)
    theirs, expected = sketch(logits, settings, vocab=5_003)
    assert_same(ours, theirs, logprobs=exact(logits, vocab=5_003), settings=settings)
    assert measured.num_labels == expected.num_labels == 200
    assert measured.squared_error == pytest.approx(expected.squared_error, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tails_are_where_a_dense_running_sum_reaches_the_next_multiple(device, dtype):
    vocab, settings = 20_011, ThresholdSketch(tau=TAU, draws=3)
    logits = random_logits(60, vocab, dtype=dtype)
    targets, _ = sketch(logits.to(device), settings, vocab=vocab)
    inside = heads(targets, vocab=vocab) > -np.inf
    tail = np.where(inside, 0, np.exp(exact(logits, vocab=vocab)))
    running = tail.cumsum(1) / TAU
    uniforms = uniforms_of(60, settings)
    ids = np.split(targets.tail_ids, np.cumsum(targets.tail_count)[:-1])
    for place, taken in enumerate(ids):
        draw, row = divmod(place, 60)
        reached = running[row, taken] + uniforms[draw, row]
        # Entry k is the token at which the sum reaches k - u: it may have gone beyond by what that token weighs.
        beyond = reached - np.arange(1, len(taken) + 1)
        assert (beyond > -1e-4).all()
        assert (beyond < tail[row, taken] / TAU + 1e-4).all()
        in_all = running[row, -1] + uniforms[draw, row]
        assert int(in_all - 1e-4) <= len(taken) <= int(in_all + 1e-4)


def test_rows_do_not_change_with_the_chunk_that_they_are_in(device):
    rows, vocab, settings = 600, 65_537, ThresholdSketch()
    logits = random_logits(rows, vocab)
    there = logits.to(device)
    whole, _ = sketch(there, settings, vocab=vocab)
    uneven = [0, 1, 98, 400, 600]
    for first, last in itertools.pairwise(uneven):
        piece, _ = sketch(there[first:last], settings, vocab=vocab, first=first)
        at = slice(int(whole.head_count[:first].sum()), int(whole.head_count[:last].sum()))
        assert np.abs(piece.head_count - whole.head_count[first:last]).sum() <= 1
        if np.array_equal(piece.head_count, whole.head_count[first:last]):
            np.testing.assert_array_equal(piece.head_ids, whole.head_ids[at])
        np.testing.assert_allclose(piece.label_logprob, whole.label_logprob[first:last], atol=1e-5)
        np.testing.assert_allclose(piece.entropy, whole.entropy[first:last], atol=1e-5)
        same = np.isin(drawn(piece) + first * 2**20, drawn(whole)).mean()
        assert same > ALMOST_ALL


@pytest.mark.parametrize("settings", [ThresholdSketch(draws=4), FullSketch(kind="full")], ids=lambda one: one.kind)
def test_the_same_logits_give_the_same_bits(device, settings):
    logits = random_logits(60, 30_011, dtype=torch.bfloat16).to(device)
    first, _ = sketch(logits, settings, vocab=30_011)
    second, _ = sketch(logits, settings, vocab=30_011)
    for name in ("head_ids", "head_logprobs", "tail_ids", "tail_count", "tail_mass", "entropy", "label_logprob"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_logits_name_their_position(device, bad):
    logits = random_logits(20, 500)
    logits[17, 3] = bad
    with pytest.raises(LogitsInvalid, match="sequence seq, position 17"):
        sketch(logits.to(device), ThresholdSketch(), vocab=500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sketch_takes_a_few_chunks_of_memory_and_no_copy_of_its_logits(counted, dtype):
    rows, vocab, chunk = 4_096, 65_536, 2**24
    logits = torch.empty(rows, vocab, dtype=dtype, device=counted)
    for part in torch.split(logits, 256):
        part.normal_(0, 2.5, generator=torch.Generator(counted).manual_seed(0))
    before = torch.cuda.memory_allocated()
    sketch(logits, ThresholdSketch(), vocab=vocab)
    taken = torch.cuda.max_memory_allocated() - before
    # Two buffers and two generations of scaled logits, float32; sums of blocks and what is made of them; walked blocks.
    allowed = 4 * chunk * 4 + rows * vocab // 64 * 32 + 2**26
    assert taken < allowed < rows * vocab * 4 / 2


def some_sequences(lengths=(40, 7, 2, 90, 23, 61)):
    generator = np.random.default_rng(0)
    return [
        TokenSequence(
            sequence_id=f"{index:032d}",
            document_id=f"{index:032d}",
            source="s",
            style="s",
            group="g",
            start=0,
            token_ids=generator.integers(0, VOCAB, length).astype(np.int32),
            label_spans=((min(1 + 3 * index, length - 1), length),),
        )
        for index, length in enumerate(lengths)
    ]


def open_on(device, folder, *, engine="transformers", dtype="float32"):
    settings = TeacherSettings(
        model="m", engine=engine, device=device, dtype=dtype, batch_tokens=128, vllm=VllmSettings(**VLLM, chunk_rows=16)
    )
    identity = teacher_identity(settings, context_tokens=96, weights="w", adapters=[])
    return open_teacher(folder, adapters=(), identity=identity, device=device, vocab_size=VOCAB)


def direct_logprobs(folder, sequences):
    """[labels, VOCAB] of each sequence, float64, by a forward pass over it alone on the CPU."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [whole(torch.from_numpy(one.token_ids.astype(np.int64))[None]).logits[0] for one in sequences]
    return [exact(rows[one.positions], vocab=VOCAB) for rows, one in zip(logits, sequences, strict=True)]


def test_a_teacher_gives_the_distributions_of_a_direct_pass_on_the_cpu(device, model, engine):
    sequences = some_sequences()
    teacher = open_on(device, model, engine=engine)
    (full, sums), (sketched, _) = teacher.score_each(
        sequences, sketches=(FullSketch(kind="full"), ThresholdSketch(tau=TAU)), seed=5
    )
    teacher.close()
    assert sums.num_labels == sum(sequence.num_labels for sequence in sequences)
    for targets, few, logprobs in zip(full, sketched, direct_logprobs(model, sequences), strict=True):
        np.testing.assert_allclose(heads(targets, vocab=VOCAB), logprobs, atol=NEAR[engine])
        clear = np.abs(logprobs - np.log(TAU)) > NEAR[engine]
        head = heads(few, vocab=VOCAB) > -np.inf
        np.testing.assert_array_equal(head[clear], (logprobs > np.log(TAU))[clear])


def test_bfloat16_is_near_float32(device, model, engine):
    scored = {}
    for dtype in ("bfloat16", "float32"):
        teacher = open_on(device, model, engine=engine, dtype=dtype)
        targets, _ = teacher.score(some_sequences(), sketch=ThresholdSketch(), seed=0)
        teacher.close()
        scored[dtype] = np.concatenate([one.label_logprob for one in targets])
    difference = np.abs(scored["bfloat16"] - scored["float32"])
    assert 0 < difference.mean() < 0.25


def test_a_closed_teacher_gives_its_memory_back_to_the_device(counted, engine, tmp_path):
    # An engine in another process asks the device how much is free, so what torch keeps for later counts as taken.
    folder = save_model(tmp_path / "large", hidden_size=1_024, intermediate_size=8_192)
    weights, workspaces = (folder / "model.safetensors").stat().st_size, 2**26
    before = torch.cuda.memory_reserved()
    teacher = open_on(counted, folder, engine=engine)
    teacher.score(some_sequences(), sketch=ThresholdSketch(), seed=0)
    assert torch.cuda.memory_reserved() >= before + weights > before + 2 * workspaces
    teacher.close()
    assert torch.cuda.memory_reserved() <= before + workspaces


def test_a_whole_job_verifies_and_agrees_with_its_teacher(device, model, engine, tiny_job, tmp_path, capsys):
    teacher = {"model": str(model), "engine": engine, "device": device, "vllm": VLLM}
    job = tiny_job(tmp_path, teacher=teacher, train={"device": device, "baseline": None})
    out = str(tmp_path / "out")
    assert main(["run", str(job), "--quiet"]) == 0, capsys.readouterr().err
    assert main(["verify", out, "--deep", "--quiet"]) == 0
    identity = read_manifest(tmp_path / "out/targets").teacher
    assert (identity["engine"], identity["device"]) == (engine, device.partition(":")[0])
    capsys.readouterr()
    assert main(["verify", out, "--against-teacher", "6", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against_teacher"]["num_beyond"] == 0
