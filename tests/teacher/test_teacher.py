"""The transformers engine against a direct forward pass, position by position."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from softshard.config import FullSketch, LoraSettings, OptimizerSettings, TeacherSettings, ThresholdSketch
from softshard.errors import LogitsInvalid, ModelInvalid, ModelMissing, PartCorrupt
from softshard.finetune.adapters.lora import load_adapter
from softshard.models import load_model, load_tokenizer
from softshard.models.decoder import Decoder, batches_by_length
from softshard.records.digest import sha256_hex
from softshard.sketch.types import TokenSequence
from softshard.storage import LocalStore
from softshard.teacher.documents import TrainedDocuments, decode_documents, encode_documents
from softshard.teacher.record import adapters_of_fold, find_adapter
from softshard.teacher.style import FoldSpec, train_fold
from softshard.teacher.transformers_engine import TransformersTeacher, engine_identity

VOCAB = 300
DOCUMENTS = TrainedDocuments({fold: bytes(range(16 * fold, 16 * fold + 80)) for fold in (0, 1)})


def sequences(lengths=(40, 7, 2, 23, 40), *, first_labels=None):
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
            label_spans=(((first_labels or [1] * len(lengths))[index], length),),
        )
        for index, length in enumerate(lengths)
    ]


def engine(folder, *, adapters=(), batch_tokens=128, dtype="float32", vocab_size=VOCAB):
    settings = TeacherSettings(model="m", device="cpu", dtype=dtype, batch_tokens=batch_tokens)
    identity = engine_identity(settings, context_tokens=512, weights="w", adapters=[])
    return TransformersTeacher(folder, adapters=adapters, identity=identity, device="cpu", vocab_size=vocab_size)


def direct(model, sequence, *, temperature=1.0):
    """[labels, VOCAB] float64 probabilities of a forward pass over one sequence alone."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, :VOCAB]
    spans = [logits[start - 1 : stop - 1] for start, stop in sequence.label_spans]
    before = torch.cat(spans).double() / temperature
    return torch.softmax(before, -1).numpy()


def dense(targets):
    """[labels, VOCAB] probabilities of a `full` sketch, before it is stored."""
    probabilities = np.zeros((len(targets.entropy), VOCAB))
    rows = np.repeat(np.arange(len(targets.entropy)), targets.head_count)
    probabilities[rows, targets.head_ids] = np.exp(targets.head_logprobs.astype(np.float64))
    return probabilities


def test_every_target_is_the_distribution_at_the_position_before_its_label(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = sequences(first_labels=[1, 3, 1, 8, 39])
    scored, _ = engine(tiny_model).score(batch, sketch=FullSketch(kind="full"), seed=0)
    for sequence, targets in zip(batch, scored, strict=True):
        expected = direct(model, sequence)
        assert len(targets.entropy) == sequence.num_labels == len(expected)
        np.testing.assert_allclose(dense(targets), expected, atol=1e-5)
        labels = expected[np.arange(len(expected)), sequence.labels]
        np.testing.assert_allclose(targets.label_logprob, np.log(labels), atol=1e-4)


MASKS = [((3, 5), (20, 29)), ((6, 7),), ((1, 2),), ((1, 4), (4, 6), (15, 23)), ((1, 40),)]


def masked(items):
    return [replace(tokens, label_spans=spans) for tokens, spans in zip(items, MASKS, strict=True)]


def test_labels_with_context_between_them_have_the_targets_that_they_have_in_full(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = masked(sequences())
    scored, sums = engine(tiny_model).score(batch, sketch=FullSketch(kind="full"), seed=0)
    assert sums.num_labels == sum(tokens.num_labels for tokens in batch) == 65
    for tokens, targets in zip(batch, scored, strict=True):
        expected = direct(model, tokens)
        assert len(targets.entropy) == tokens.num_labels == len(expected)
        np.testing.assert_allclose(dense(targets), expected, atol=1e-5)
        labels = expected[np.arange(len(expected)), tokens.labels]
        np.testing.assert_allclose(targets.label_logprob, np.log(labels), atol=1e-4)


def test_a_label_draws_the_same_tail_whatever_else_is_a_label(tiny_model):
    whole, _ = engine(tiny_model).score(sequences(), sketch=ThresholdSketch(), seed=4)
    some, _ = engine(tiny_model).score(masked(sequences()), sketch=ThresholdSketch(), seed=4)
    for tokens, complete, part in zip(masked(sequences()), whole, some, strict=True):
        rows = tokens.positions
        np.testing.assert_allclose(part.label_logprob, complete.label_logprob[rows], atol=1e-5)
        tails = np.split(complete.tail_ids, np.cumsum(complete.tail_count)[:-1])
        kept = np.concatenate([tails[row] for row in rows])
        assert np.mean(part.tail_count == complete.tail_count[rows]) > 0.98  # a running sum may move in its last bits
        assert np.isin(part.tail_ids, kept).mean() > 0.98


def test_context_is_never_projected(tiny_model, monkeypatch):
    rows = []
    logits = Decoder.logits
    opened = engine(tiny_model, batch_tokens=10_000)
    monkeypatch.setattr(Decoder, "logits", lambda self, states: rows.append(len(states)) or logits(self, states))
    opened.score(masked(sequences()), sketch=ThresholdSketch(), seed=4)
    assert rows == [65]


def test_temperature_divides_the_logits(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (sequence,) = sequences((20,))
    ((targets,), _) = engine(tiny_model).score([sequence], sketch=FullSketch(kind="full", temperature=2.0), seed=0)
    np.testing.assert_allclose(dense(targets), direct(model, sequence, temperature=2.0), atol=1e-5)


def test_batches_do_not_change_what_is_drawn(tiny_model):
    batch = sequences()
    whole, _ = engine(tiny_model, batch_tokens=10_000).score(batch, sketch=ThresholdSketch(), seed=4)
    for sequence, targets in zip(batch, whole, strict=True):
        ((alone,), _) = engine(tiny_model, batch_tokens=1).score([sequence], sketch=ThresholdSketch(), seed=4)
        np.testing.assert_allclose(targets.label_logprob, alone.label_logprob, atol=1e-5)
        assert np.mean(targets.tail_count == alone.tail_count) > 0.98  # a running sum may move in its last bits
        assert np.isin(targets.tail_ids, alone.tail_ids).mean() > 0.98


def test_same_sequences_give_the_same_bits(tiny_model):
    first, _ = engine(tiny_model).score(sequences(), sketch=ThresholdSketch(), seed=4)
    second, _ = engine(tiny_model).score(sequences(), sketch=ThresholdSketch(), seed=4)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.tail_ids, other.tail_ids)
        np.testing.assert_array_equal(one.head_logprobs, other.head_logprobs)


def test_bfloat16_is_near_float32(tiny_model):
    half, _ = engine(tiny_model, dtype="bfloat16").score(sequences(), sketch=ThresholdSketch(), seed=0)
    full, _ = engine(tiny_model).score(sequences(), sketch=ThresholdSketch(), seed=0)
    difference = np.concatenate([a.label_logprob - b.label_logprob for a, b in zip(half, full, strict=True)])
    assert 0 < np.abs(difference).mean() < 0.1


def test_broken_weights_are_named_by_sequence_and_position(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[:] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(LogitsInvalid, match="position 0"):
        engine(tmp_path).score(sequences((5,)), sketch=ThresholdSketch(), seed=0)


def test_targets_of_a_model_that_caps_its_logits_are_those_of_the_capped_ones(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=320, num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.5, **sizes)
    model = Gemma2ForCausalLM(config).eval()
    model.lm_head.weight.data *= 40
    model.save_pretrained(tmp_path)
    (tokens,) = sequences((9,))
    (targets,), _ = engine(tmp_path).score([tokens], sketch=ThresholdSketch(), seed=0)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.token_ids).long()[None]).logits[0, :-1, :300]
    assert 1.2 < logits.abs().max() <= 1.5, "the cap is in force"
    logs = torch.log_softmax(logits.double(), dim=1)
    expected = logs[range(tokens.num_labels), tokens.labels.tolist()]
    assert targets.label_logprob == pytest.approx(expected.numpy(), abs=1e-5)


def test_missing_model_and_missing_weights_are_named(tmp_path):
    from softshard.models import resolve_model, weights_digest

    with pytest.raises(ModelMissing, match="no such folder"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelInvalid, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelInvalid, match="no weights"):
        weights_digest(tmp_path)


def test_batches_hold_everything_once_within_the_budget():
    items = sequences((5, 40, 12, 12, 40, 3, 100))
    batches = list(batches_by_length(items, batch_tokens=50))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch in batches:
        longest = max(len(items[index].token_ids) for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= 50


@pytest.fixture(scope="module")
def folds(tiny_model, tmp_path_factory):
    store = LocalStore(tmp_path_factory.mktemp("teacher"))
    plans = []
    for fold in range(2):
        plan = FoldSpec(
            fold=fold,
            documents=DOCUMENTS.digests((1 - fold,)),
            context_tokens=96,
            overlap_tokens=1,
            model="tiny",
            weights="w",
            tokenizer_fingerprint="f",
            vocab_size=VOCAB,
            lora=LoraSettings(rank=4),
            optimizer=OptimizerSettings(learning_rate=2e-2, epochs=3, batch_tokens=64),
            dtype="float32",
            device="cpu",
            num_threads=1,
            seed=fold,
        )
        train_fold(
            plan,
            sequences(),
            documents=encode_documents(DOCUMENTS),
            folder=tiny_model,
            device="cpu",
            store=store,
            on_step=lambda step: None,
        )
        plans.append(plan)
    return store, plans


def adapted(tiny_model, store, plan):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    return load_adapter(model, store.local_path(plan.folder), adapter_name="default", device="cpu")


def test_an_adapter_is_in_force_when_it_scores(tiny_model, folds):
    store, plans = folds
    batch = sequences()
    folder = store.local_path(plans[0].folder)
    scored, _ = engine(tiny_model, adapters=(folder,)).score(batch, sketch=FullSketch(kind="full"), seed=0)
    model, base = adapted(tiny_model, store, plans[0]), AutoModelForCausalLM.from_pretrained(tiny_model)
    for sequence, targets in zip(batch, scored, strict=True):
        np.testing.assert_allclose(dense(targets), direct(model, sequence), atol=1e-5)
        assert np.abs(dense(targets) - direct(base, sequence)).max() > 1e-3


def test_the_hold_out_is_scored_by_the_mean_of_all_folds(tiny_model, folds):
    store, plans = folds
    batch = sequences()
    folders = tuple(store.local_path(plan.folder) for plan in plans)
    scored, _ = engine(tiny_model, adapters=folders).score(batch, sketch=FullSketch(kind="full"), seed=0)
    for sequence, targets in zip(batch, scored, strict=True):
        expected = np.mean([direct(adapted(tiny_model, store, plan), sequence) for plan in plans], axis=0)
        np.testing.assert_allclose(dense(targets), expected, atol=1e-5)


def test_a_finished_adapter_is_found_and_a_damaged_one_refused(folds, tmp_path):
    store, plans = folds
    receipt = find_adapter(store, plans[0].folder)
    assert receipt is not None
    assert receipt.num_sequences == 5
    assert find_adapter(store, replace(plans[0], seed=77).folder) is None
    copy = LocalStore(tmp_path)
    for path in store.list(plans[0].folder):
        copy.put_once(path, store.read(path))
    assert find_adapter(copy, plans[0].folder) == receipt
    weights = copy.local_path(f"{plans[0].folder}/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(PartCorrupt, match="adapter_model"):
        find_adapter(copy, plans[0].folder)


def test_a_receipt_in_another_adapters_folder_is_refused(folds, tmp_path):
    store, plans = folds
    copy, other = LocalStore(tmp_path), plans[0].folder.replace("fold-0", "fold-1")
    for path in store.list(plans[0].folder):
        copy.put_once(path.replace(plans[0].folder, other), store.read(path))
    for look in (lambda: find_adapter(copy, other), lambda: adapters_of_fold(copy, 1)):
        with pytest.raises(PartCorrupt, match=f"its receipt is that of {plans[0].folder}"):
            look()
    assert adapters_of_fold(copy, 0) == []


def test_the_documents_of_an_adapter_are_read_as_they_were_written(folds):
    store, plans = folds
    path = f"{plans[0].folder}/documents.parquet"
    assert decode_documents(store.read(path), uri=path) == DOCUMENTS
    assert DOCUMENTS.in_order()[5] == bytes(range(16, 32)).hex()
    zeros = TrainedDocuments({2: bytes(32)})
    assert decode_documents(encode_documents(zeros), uri=path) == zeros
    assert zeros.digests((0, 2)) == (sha256_hex(b""), sha256_hex(bytes(32)))


def test_a_list_of_documents_that_is_something_else_is_refused():
    sink = io.BytesIO()
    pq.write_table(pa.table({"fold": [0], "document_id": ["00"]}), sink)
    for content, problem in ((b"fold,document_id", "is not readable as Parquet"), (sink.getvalue(), "its columns")):
        with pytest.raises(PartCorrupt, match=problem):
            decode_documents(content, uri="list")


def test_tokenizer_fingerprint_tells_tokenizers_apart(tiny_model, tmp_path):
    from fakes.tiny import save_tiny_model

    other = save_tiny_model(tmp_path, words=("zebra zebra zebra",) * 50)
    assert load_tokenizer(tiny_model).fingerprint != load_tokenizer(other).fingerprint
