import dataclasses

import numpy as np
import pytest
import torch

from softshard.errors import HoldoutEmpty, LogitsInvalid, VocabularyMismatch
from softshard.evaluate.labels import score_labels
from softshard.evaluate.scoring import retention_nll, score_holdout
from softshard.models import load_model, load_tokenizer
from softshard.shard.schema import Fidelity, PartMetadata
from softshard.sketch.types import SequenceTargets, TokenSequence

V = 300
BINS = 7


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    """Surer of itself than random weights are, so that probabilities of all sizes occur."""
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    model.model.norm.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def sequences(texts, tokenizer):
    """Two documents in overlapping windows and the rest whole, of very different lengths."""
    windows = []
    for number, text in enumerate(texts):
        ids = [*tokenizer.encode([text])[0], tokenizer.eos_id]
        if number < 2:
            windows += [window(number, ids[:20], 0, 1), window(number, ids[15:], 15, 5)]
        else:
            windows.append(window(number, ids[: 10 * number], 0, 1))
    return windows


def window(document, ids, start, first_label, *, label_spans=None):
    return TokenSequence(
        sequence_id=f"{document}-{start}",
        document_id=str(document),
        source="s",
        style="t",
        group="g",
        start=start,
        token_ids=np.array(ids, dtype=np.int32),
        label_spans=label_spans or ((first_label, len(ids)),),
    )


def metadata(kind, *, tau=None, step=1e-4):
    return PartMetadata(
        schema_version=1,
        part_id="p",
        kind=kind,
        tau=tau,
        draws=1,
        k=None,
        nucleus_mass=None,
        step=step,
        temperature=1.0,
        seed=0,
        tokenizer_fingerprint="f",
        vocab_size=V,
        teacher={},
        fidelity=Fidelity(
            mean_squared_error=0,
            gradient_angle_degrees=0,
            mean_kl_nats=None,
            mean_entries=0,
            mass_by_rank=None,
            num_ranked=0,
        ),
    )


def teacher_logp(sequence, seed=5):
    """[P, V] some distributions that are not the model's."""
    generator = torch.Generator().manual_seed(seed + len(sequence.token_ids))
    logits = 3 * torch.randn(sequence.num_labels, V, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, 1).numpy()


def targets_of(logp, sequence, *, tau=None, rng=None):
    """Targets with all tokens in the head, or with those below tau drawn one by one with probability p / tau."""
    order = np.argsort(-logp, axis=1, kind="stable")
    sorted_logp = np.take_along_axis(logp, order, 1)
    heads = np.ones_like(logp, dtype=bool) if tau is None else np.exp(sorted_logp) >= tau
    tails = np.zeros_like(heads) if tau is None else ~heads & (rng.random(logp.shape) < np.exp(sorted_logp) / tau)
    return SequenceTargets(
        label_logprob=logp[np.arange(len(logp)), sequence.labels].astype(np.float32),
        entropy=-(np.exp(logp) * logp).sum(1).astype(np.float32),
        tail_mass=(np.exp(sorted_logp) * ~heads).sum(1).astype(np.float32),
        head_count=heads.sum(1).astype(np.int32),
        tail_count=tails.sum(1).astype(np.int32),
        head_ids=order[heads].astype(np.int32),
        head_logprobs=sorted_logp[heads].astype(np.float32),
        tail_ids=np.concatenate([np.sort(ids[taken]) for ids, taken in zip(order, tails, strict=True)]).astype(
            np.int32
        ),
    )


def full_rows(sequences, kind="full"):
    return [((s, targets_of(teacher_logp(s), s)), metadata(kind)) for s in sequences]


def dense(model, sequence):
    """[P, V] log-probabilities by a direct forward pass of one sequence, in float64, padding logits left out."""
    with torch.no_grad():
        logits = model(torch.tensor(sequence.token_ids[None].astype(np.int64))).logits[0].double()
    places = [label - 1 for start, stop in sequence.label_spans for label in range(start, stop)]
    return torch.log_softmax(logits[places, :V], 1).numpy()


def score(model, rows, tokenizer, *, batch_tokens=200, **changes):
    settings = {"num_valid": V, "num_bins": BINS, "on_progress": lambda done: None}
    return score_holdout(model, rows, tokenizer=tokenizer, batch_tokens=batch_tokens, **(settings | changes))


def test_label_j_is_predicted_at_the_position_before_it(model, sequences):
    pairs = score_labels(model, [(s, None) for s in sequences], num_valid=V, batch_tokens=150)
    scored = {sequence.sequence_id: scores for sequence, scores in pairs}
    assert len(scored) == len(sequences)
    for sequence in sequences:
        logq = dense(model, sequence)
        for j in range(sequence.num_labels):
            label = sequence.token_ids[sequence.label_spans[0][0] + j]
            assert scored[sequence.sequence_id].nll[j] == pytest.approx(-logq[j, label], abs=5e-5)


def test_means_agree_with_a_direct_forward_pass_in_float64(model, sequences, tokenizer):
    scores = score(model, full_rows(sequences), tokenizer)
    logq = np.concatenate([dense(model, s) for s in sequences])
    logp = np.concatenate([teacher_logp(s) for s in sequences])
    labels = np.concatenate([s.labels for s in sequences])
    rows = np.arange(len(labels))
    assert scores.num_labels == len(labels)
    assert scores.num_labels > 256, "more labels than one piece of logits has"
    assert scores.human_nll_nats == pytest.approx(-logq[rows, labels].mean(), abs=5e-5)
    assert scores.teacher_nll_nats == pytest.approx(-logp[rows, labels].mean(), abs=5e-5)
    assert scores.mean_entropy_nats == pytest.approx(-(np.exp(logq) * logq).sum(1).mean(), abs=5e-5)
    assert scores.accuracy == pytest.approx((logq.argmax(1) == labels).mean())
    assert scores.kl_to_teacher_nats == pytest.approx((np.exp(logp) * (logp - logq)).sum(1).mean(), abs=1e-3)


@pytest.fixture
def answers():
    """Sequences in which context lies between the labels."""
    ids = np.random.default_rng(5).integers(0, V, (3, 40))
    spans = (((4, 9), (20, 31)), ((1, 40),), ((2, 3), (7, 8), (38, 40)))
    return [window(n, row.tolist(), 0, 1, label_spans=own) for n, (row, own) in enumerate(zip(ids, spans, strict=True))]


def test_only_labels_are_scored_where_context_lies_between_them(model, answers, tokenizer):
    scores = score(model, full_rows(answers), tokenizer)
    logq, logp = (np.concatenate([of(s) for s in answers]) for of in (lambda s: dense(model, s), teacher_logp))
    labels = np.concatenate([s.labels for s in answers])
    assert scores.num_labels == len(labels) == 16 + 39 + 4
    assert scores.human_nll_nats == pytest.approx(-logq[range(59), labels].mean(), abs=5e-5)
    assert scores.kl_to_teacher_nats == pytest.approx((np.exp(logp) * (logp - logq)).sum(1).mean(), abs=1e-3)
    assert {name: found.num_labels for name, found in scores.documents.items()} == {"0": 16, "1": 39, "2": 4}


def test_the_text_between_labels_counts_no_bytes(model, tokenizer):
    pieces = tokenizer.encode(["Was it cold?", " Very — the é froze.", " And then?", " We went home."])
    bounds = np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()
    spans = ((bounds[1], bounds[2]), (bounds[3], bounds[4]))
    rows = full_rows([window(0, [token for piece in pieces for token in piece], 0, 1, label_spans=spans)])
    assert score(model, rows, tokenizer).num_bytes == len((" Very — the é froze." + " We went home.").encode())


def test_calibration_error_is_the_weighted_gap_of_equal_bins(model, sequences, tokenizer):
    scores = score(model, full_rows(sequences), tokenizer)
    logq = np.concatenate([dense(model, s) for s in sequences])
    labels = np.concatenate([s.labels for s in sequences])
    confidence, correct = np.exp(logq).max(1), logq.argmax(1) == labels
    expected = 0.0
    for index, shown in enumerate(scores.reliability):
        inside = (confidence > index / BINS) & (confidence <= (index + 1) / BINS)
        assert shown.num_labels == inside.sum()
        if inside.any():
            assert shown.accuracy == pytest.approx(correct[inside].mean())
            assert shown.confidence == pytest.approx(confidence[inside].mean(), abs=5e-5)
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert scores.ece == pytest.approx(expected, abs=5e-5)
    assert sum(shown.num_labels > 0 for shown in scores.reliability) > 2, "the bins are put to use"


def test_bits_per_byte_counts_the_bytes_of_each_label_once(model, tokenizer):
    text = "Zoë paid 5 € — 日本語 and 🎉 too."
    ids = [*tokenizer.encode([text])[0], tokenizer.eos_id]
    first_token_bytes = len(tokenizer.decode(ids[:1]).encode())
    for cut in range(8, 20):
        windows = [window(0, ids[:cut], 0, 1), window(0, ids[cut - 7 :], cut - 7, 7)]
        scores = score(model, full_rows(windows), tokenizer)
        assert scores.num_bytes == len(text.encode()) - first_token_bytes
        nats = sum(-dense(model, w)[range(w.num_labels), w.labels].sum() for w in windows)
        assert scores.bits_per_byte == pytest.approx(nats / np.log(2) / scores.num_bytes, rel=1e-5)


def test_kl_of_threshold_sketches_is_unbiased(model, sequences, tokenizer):
    sequence = sequences[5]
    logp, logq = teacher_logp(sequence), dense(model, sequence)
    exact = (np.exp(logp) * (logp - logq)).sum(1).mean()
    rng = np.random.default_rng(0)
    values = []
    for _ in range(60):
        targets = targets_of(logp, sequence, tau=1 / 8, rng=rng)
        scores = score(model, [((sequence, targets), metadata("threshold", tau=1 / 8))], tokenizer)
        values.append(scores.kl_to_teacher_nats)
    assert np.std(values) > 1e-3, "sampled targets differ from draw to draw"
    assert abs(np.mean(values) - exact) < 4 * np.std(values, ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize("kind", ["topk", "nucleus"])
def test_kl_to_truncated_targets_is_not_given(model, sequences, tokenizer, kind):
    rows = [*full_rows(sequences[:1]), *full_rows(sequences[1:3], kind)]
    assert score(model, rows, tokenizer).kl_to_teacher_nats is None


def test_neither_the_batch_nor_the_order_of_rows_changes_the_result(model, sequences, tokenizer):
    rows = full_rows(sequences)
    alone = score(model, rows, tokenizer, batch_tokens=1)
    together = score(model, rows[::-1], tokenizer, batch_tokens=10_000)
    for name in ("human_nll_nats", "bits_per_byte", "kl_to_teacher_nats", "ece", "accuracy", "mean_entropy_nats"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), abs=5e-5), name


def test_documents_sum_up_to_the_mean(model, sequences, tokenizer):
    scores = score(model, full_rows(sequences), tokenizer)
    own = [s for s in sequences if s.document_id == "1"]
    nats = sum(-dense(model, s)[range(s.num_labels), s.labels].sum() for s in own)
    assert scores.documents["1"].nll_nats == pytest.approx(nats, rel=1e-5)
    assert scores.documents["1"].num_labels == sum(s.num_labels for s in own)
    total = sum(one.nll_nats for one in scores.documents.values())
    assert total / scores.num_labels == pytest.approx(scores.human_nll_nats)


def test_an_attached_adapter_is_in_force(tiny_model, sequences, tokenizer):
    from peft import LoraConfig, get_peft_model

    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    plain = score(base, full_rows(sequences[:3]), tokenizer).human_nll_nats
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    scores = score(adapted, full_rows(sequences[:3]), tokenizer)
    nll = np.concatenate([-dense(adapted, s)[range(s.num_labels), s.labels] for s in sequences[:3]]).mean()
    assert scores.human_nll_nats == pytest.approx(nll, abs=5e-5)
    assert abs(scores.human_nll_nats - plain) > 1e-2


def test_retention_is_the_same_loss_without_targets(model, sequences, tokenizer):
    nll = retention_nll(model, iter(sequences), num_valid=V, batch_tokens=200, on_progress=lambda done: None)
    assert nll == pytest.approx(score(model, full_rows(sequences), tokenizer).human_nll_nats)


def test_progress_ends_with_all_labels(model, sequences, tokenizer):
    told = []
    scores = score(model, full_rows(sequences), tokenizer, on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == scores.num_labels


def test_an_empty_holdout_is_named_with_the_way_out(model, tokenizer):
    with pytest.raises(HoldoutEmpty, match=r"corpus\.holdout_fraction"):
        score(model, [], tokenizer)
    with pytest.raises(HoldoutEmpty, match=r"train\.retention\.sources"):
        retention_nll(model, [], num_valid=V, batch_tokens=9, on_progress=lambda done: None)


def test_a_model_that_gives_nan_is_named_with_its_place(tiny_model, sequences, tokenizer):
    broken = load_model(tiny_model, dtype=torch.float32, device="cpu")
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(LogitsInvalid, match=r"0-15, position 4: .*train.dtype") as raised:
        score(broken, full_rows(sequences[1:2]), tokenizer)
    assert raised.value.exit_code == 3


def test_a_vocabulary_larger_than_the_model_is_refused(model, sequences, tokenizer):
    with pytest.raises(VocabularyMismatch, match="320"):
        score(model, full_rows(sequences), tokenizer, num_valid=321)


def test_scores_are_frozen(model, sequences, tokenizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        score(model, full_rows(sequences[:1]), tokenizer).ece = 0
