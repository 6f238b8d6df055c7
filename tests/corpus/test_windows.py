import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from softshard.corpus.screen import ScreenedDocument
from softshard.corpus.windows import document_windows, make_sequence_id, num_document_tokens, num_windows
from softshard.models import Tokenizer

BOS, EOS = 900, 901
DOCUMENT = ScreenedDocument(
    document_id="d" * 32,
    name="a.txt",
    text="not looked at",
    num_bytes=13,
    source="letters",
    style="plain",
    group="Ada",
    split="train",
    fold=1,
)


def tokenizer(*, bos=None, fingerprint="f" * 64):
    return Tokenizer(backend=None, fingerprint=fingerprint, vocab_size=1000, bos_id=bos, eos_id=EOS)


def windows(ids, *, context, overlap, bos=None):
    return list(
        document_windows(
            DOCUMENT,
            token_ids=np.array(ids, dtype=np.int32),
            tokenizer=tokenizer(bos=bos),
            context_tokens=context,
            overlap_tokens=overlap,
        )
    )


SHAPES = st.integers(2, 12).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context - 1)))


@given(length=st.integers(1, 80), shape=SHAPES, bos=st.sampled_from([None, BOS]))
def test_every_token_but_the_first_is_the_label_of_exactly_one_window(length, shape, bos):
    context, overlap = shape
    whole = [*([] if bos is None else [bos]), *range(length), EOS]
    found = windows(range(length), context=context, overlap=overlap, bos=bos)
    labelled = []
    for sequence in found:
        assert list(sequence.token_ids) == whole[sequence.start : sequence.start + len(sequence.token_ids)]
        assert 1 <= len(sequence.token_ids) <= context
        assert sequence.num_labels >= 1
        labelled += (sequence.start + sequence.label_indices).tolist()
    assert labelled == list(range(1, len(whole)))
    assert len(found) == num_windows(len(whole), context_tokens=context, overlap_tokens=overlap)
    assert num_document_tokens(np.arange(length), tokenizer=tokenizer(bos=bos)) == len(whole)


@given(length=st.integers(1, 80), shape=SHAPES)
def test_bos_is_never_a_label_and_eos_is_the_last_one(length, shape):
    found = windows(range(length), context=shape[0], overlap=shape[1], bos=BOS)
    labels = [int(token) for sequence in found for token in sequence.labels]
    assert labels == [*range(length), EOS]


@given(length=st.integers(1, 80), shape=SHAPES)
def test_later_windows_see_the_overlap_as_context(length, shape):
    context, overlap = shape
    first, *later = windows(range(length), context=context, overlap=overlap)
    assert (first.start, first.label_spans) == (0, ((1, len(first.token_ids)),))
    for number, sequence in enumerate(later, start=1):
        assert sequence.start == number * (context - overlap)
        assert sequence.label_spans == ((overlap, len(sequence.token_ids)),)


def test_windows_of_ten_tokens_by_hand():
    found = windows(range(9), context=5, overlap=2)
    assert [list(sequence.token_ids) for sequence in found] == [
        [0, 1, 2, 3, 4],
        [3, 4, 5, 6, 7],
        [6, 7, 8, EOS],
    ]
    assert [list(sequence.labels) for sequence in found] == [[1, 2, 3, 4], [5, 6, 7], [8, EOS]]


def test_window_that_reaches_the_end_is_the_last():
    assert [list(sequence.token_ids) for sequence in windows(range(4), context=5, overlap=2)] == [[0, 1, 2, 3, EOS]]


def test_document_of_one_token_has_one_label():
    (sequence,) = windows([7], context=512, overlap=64)
    assert list(sequence.token_ids) == [7, EOS]
    assert list(sequence.labels) == [EOS]


def test_document_without_tokens_has_no_sequence():
    assert windows([], context=8, overlap=2) == []


def test_sequence_carries_its_document():
    (sequence,) = windows([7], context=8, overlap=2)
    assert (sequence.document_id, sequence.source, sequence.style, sequence.group) == (
        DOCUMENT.document_id,
        "letters",
        "plain",
        "Ada",
    )
    assert sequence.token_ids.dtype == np.int32


def test_sequence_id_is_the_digest_of_document_tokenizer_and_window():
    expected = hashlib.blake2b(b"d" * 32 + b"\n" + b"f" * 64 + b"\n3\n5\n2", digest_size=16).hexdigest()
    assert windows(range(9), context=5, overlap=2)[1].sequence_id == expected


def test_anything_that_changes_a_window_changes_its_id():
    base = {"tokenizer": tokenizer(), "start": 0, "context_tokens": 12, "overlap_tokens": 3}
    changes = [
        {},
        {"tokenizer": tokenizer(fingerprint="0" * 64)},
        {"start": 9},
        {"context_tokens": 13},
        {"overlap_tokens": 4},
        {"start": 1, "context_tokens": 2, "overlap_tokens": 1},
        {"start": 11, "context_tokens": 21, "overlap_tokens": 1},
    ]
    found = {make_sequence_id("d" * 32, **{**base, **change}) for change in changes}
    found.add(make_sequence_id("e" * 32, **base))
    assert len(found) == len(changes) + 1
