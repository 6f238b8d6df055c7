from types import SimpleNamespace

import pytest

from softshard.evaluate.comparison import human_metrics, model_metrics, nll_difference, pick_examples, plot_data
from softshard.evaluate.samples import Continuations, Prompt, Samples
from softshard.evaluate.scoring import DocumentSum, HoldoutScores, ReliabilityBin


def scores(documents, nll=2.0):
    return HoldoutScores(
        human_nll_nats=nll,
        bits_per_byte=1.1,
        kl_to_teacher_nats=0.2,
        teacher_nll_nats=1.9,
        ece=0.03,
        accuracy=0.4,
        mean_entropy_nats=1.8,
        num_labels=3,
        num_sequences=2,
        num_bytes=9,
        reliability=(ReliabilityBin(lower=0, upper=1, num_labels=3, confidence=0.5, accuracy=0.4),),
        documents={name: DocumentSum(nll_nats=nats, num_labels=count) for name, (nats, count) in documents.items()},
    )


def samples(token_ids, texts):
    return Samples(
        continuations=Continuations(token_ids=token_ids, texts=texts),
        num_ended=1,
        decode_seconds=0.6,
        num_sequence_steps=20,
    )


HUMAN = Continuations(token_ids=((1, 2), (3, 4, 5, 6)), texts=(" One two. Three", " four five six. One two"))
MODEL = samples(((1, 1), (2, 2)), (" One one one one.", " Two"))


def test_difference_and_its_error_are_paired_by_document():
    first = scores({"a": (3.0, 2), "b": (1.0, 1)})
    second = scores({"b": (1.5, 1), "a": (2.0, 2)})
    # differences 1 and -1/2 over 2 and 1 labels: ratio 1/6; residuals 2/3 and -2/3; sqrt(2/1 * 8/9) / 3 = 4/9
    difference = nll_difference(first, second)
    assert difference.difference_nats == pytest.approx(1 / 6)
    assert difference.standard_error_nats == pytest.approx(4 / 9)


def test_what_all_documents_share_is_no_error():
    difference = nll_difference(scores({"a": (5.0, 2), "b": (2.5, 1)}), scores({"a": (3.0, 2), "b": (1.5, 1)}))
    assert difference.difference_nats == pytest.approx(1)
    assert difference.standard_error_nats == pytest.approx(0, abs=1e-12)


def test_one_document_has_no_standard_error():
    assert nll_difference(scores({"a": (3.0, 2)}), scores({"a": (2.0, 2)})).standard_error_nats is None


def test_human_metrics_measure_the_continuations():
    human = human_metrics(HUMAN)
    # words: one two three | four five six one two: 6 different of 8
    assert human.mattr == pytest.approx(6 / 8)
    # pairs: (one two) (two three) | (four five) (five six) (six one) (one two): 5 different of 6
    assert human.distinct_2 == pytest.approx(5 / 6)
    assert human.distinct_3 == pytest.approx(1)
    # sentences of 2, 1, 3 and 2 words
    assert human.mean_sentence_words == pytest.approx(2)
    assert human.mean_sample_tokens == pytest.approx(3)


def test_model_metrics_stand_beside_the_human_continuations():
    metrics = model_metrics(scores({"a": (6.0, 3)}), MODEL, human=HUMAN, vocab_size=8, retention_nll_nats=2.5)
    assert metrics.mattr == pytest.approx(2 / 5)
    assert metrics.distinct_2 == pytest.approx(1 / 3)
    # lengths 1, 4 against 1, 2, 2, 3; doubled to 1, 1, 4, 4: shifts 0, 1, 2, 1
    assert metrics.sentence_length_w1 == pytest.approx(1)
    # frequencies 1/2, 1/2 of the ids 1 and 2 against 1/6 each of 1..6
    assert metrics.token_l2 == pytest.approx((2 * (1 / 3) ** 2 + 4 * (1 / 6) ** 2) ** 0.5)
    assert metrics.mean_sample_tokens == 2
    assert metrics.ms_per_token == pytest.approx(30)
    assert (metrics.human_nll_nats, metrics.ece, metrics.retention_nll_nats) == (2.0, 0.03, 2.5)


def test_plot_data_hold_people_and_models():
    data = plot_data(human=HUMAN, scores={"base": scores({"a": (1.0, 1)})}, samples={"base": MODEL})
    assert data.sentence_lengths == {"human": (2, 1, 3, 2), "base": (4, 1)}
    assert data.rank_frequency["base"] == pytest.approx((4 / 5, 1 / 5))
    assert [one.accuracy for one in data.reliability["base"]] == [0.4]


def test_examples_keep_the_order_of_the_prompts_and_leave_out_the_beginning_token():
    tokenizer = SimpleNamespace(bos_id=9, decode=lambda ids: "-".join(map(str, ids)))
    prompts = [Prompt(sequence_id=str(n), token_ids=(9, n, n), human_continuation=()) for n in (1, 2)]
    first, second = pick_examples(prompts, tokenizer=tokenizer, human=HUMAN, base=MODEL, ce=None, adapter=MODEL)
    assert (first.prompt, first.human, first.base) == ("1-1", " One two. Three", " One one one one.")
    assert (second.prompt, second.adapter, second.ce) == ("2-2", " Two", None)
