import hashlib
import tracemalloc

import pytest

from softshard.config import CorpusSettings, SourceSettings
from softshard.corpus.screen import Screen, assign_fold, assign_split, normalise
from softshard.sources.documents import RawDocument

SOURCE = SourceSettings(name="letters", uri="letters/", style="plain", license="CC0-1.0", rights_basis="owned")


def settings(**changes):
    return CorpusSettings.model_validate({"sources": (SOURCE,), **changes})


def raw(text, *, name="letters/a.txt", problem=None):
    return RawDocument(name=name, text=text, group="Ada", problem=problem)


def admit_all(texts, *, seed=0, folds=2, **changes):
    screen = Screen(settings(**changes), folds=folds, seed=seed)
    return [screen.admit(raw(text), source=SOURCE) for text in texts], screen


def ids(number):
    return [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(number)]


def test_document_keeps_what_it_is_filtered_and_joined_by():
    (document,), _ = admit_all(["Dawn.\n"])
    assert document.text == "Dawn.\n"
    assert document.document_id == hashlib.blake2b(b"Dawn.\n", digest_size=16).hexdigest()
    assert (document.source, document.style, document.group, document.num_bytes) == ("letters", "plain", "Ada", 6)


def test_unicode_form_is_the_one_asked_for():
    decomposed = "cafe\u0301 \ufb01n"
    assert normalise(decomposed, form="NFC") == "caf\u00e9 \ufb01n"
    assert normalise(decomposed, form="NFKC") == "caf\u00e9 fin"
    assert normalise(decomposed, form="none") == decomposed


@pytest.mark.parametrize("form", ["NFC", "NFKC", "none"])
def test_line_ends_become_lf_and_nul_goes_in_every_form(form):
    assert normalise("a\r\nb\rc\n\x00d", form=form) == "a\nb\nc\nd"


def test_bytes_are_those_of_the_normalised_text():
    (document,), _ = admit_all(["cafe\u0301\r\n"])
    assert document.num_bytes == 6  # c a f é(2) LF


def test_texts_that_are_equal_once_normalised_are_kept_once():
    kept, screen = admit_all(["caf\u00e9\n", "cafe\u0301\r\n", "caf\u00e9", "caf\u00e9\n"], duplicates="exact")
    assert [document is not None for document in kept] == [True, False, True, False]
    assert screen.counts["duplicate"] == 2


SPELLINGS = {
    "He wrote: no.": "exact",
    "He wrote: no.\n": "spacing",
    "\n  He\u00a0wrote:\n\nno.": "spacing",
    "he wrote -- No!": "words",
    "HE WROTE: NO": "words",
    "Hewrote: no.": None,
    "He wrote no. 1.": None,
}


@pytest.mark.parametrize("duplicates", ["exact", "spacing", "words"])
def test_setting_says_what_makes_documents_duplicates_and_the_first_is_kept_as_written(duplicates):
    order = ["exact", "spacing", "words"]
    expected = [text for text, by in SPELLINGS.items() if by is None or order.index(by) > order.index(duplicates)]
    kept, screen = admit_all(["He wrote: no.", *SPELLINGS], duplicates=duplicates)
    assert [document.text for document in kept if document] == ["He wrote: no.", *expected]
    assert screen.counts["duplicate"] == len(SPELLINGS) - len(expected)


@pytest.mark.parametrize("duplicates", ["spacing", "words"])
def test_long_texts_are_compared_as_a_whole(duplicates):
    words = [f"word{i}" for i in range(40_000)]
    text = " ".join(words)
    long_word = "x" * 200_000
    same = ["\n".join(words), "  ".join(words) + "\n", f" {long_word}\t{long_word}"]
    other = [" ".join(words[:-1]), " ".join([*words, "end"]), text.replace("word20000 ", "word 20000 "), long_word * 2]
    kept, _ = admit_all([text, f"{long_word} {long_word}", *same, *other], duplicates=duplicates)
    assert [document is not None for document in kept] == [True, True, *[False] * len(same), *[True] * len(other)]


STORY = " ".join(f"On day {i} the boat came in with {i * 7 % 31} fish and went out again." for i in range(40))
EDITED = STORY.replace("day 20 the boat came", "day 20 the old boat came")
OTHER = " ".join(f"In week {i} a cart went up to the mill with {i * 5 % 29} sacks of rye." for i in range(40))


def test_near_duplicates_are_left_out_and_counted_where_the_settings_ask_for_it():
    kept, screen = admit_all([STORY, EDITED, OTHER])
    assert [document is not None for document in kept] == [True, True, True]
    assert "near_duplicate" not in screen.counts
    kept, screen = admit_all([STORY, EDITED, OTHER, STORY], near_duplicates=True)
    assert [document is not None for document in kept] == [True, False, True, False]
    assert (screen.counts["near_duplicate"], screen.counts["duplicate"]) == (1, 1)
    assert "1 near_duplicate (first: letters/a.txt)" in screen.summary()
    kept, _ = admit_all([EDITED, STORY], near_duplicates=True)
    assert [document.text for document in kept if document] == [EDITED], "the first is kept"


def test_settings_without_near_duplicates_are_what_they_were():
    assert "near_duplicates" not in settings().model_dump()
    assert settings(near_duplicates=True).model_dump()["near_duplicates"] is True


def test_texts_without_words_are_compared_by_their_signs():
    kept, _ = admit_all(["* * *", "*  * *\n", "!?"], duplicates="words")
    assert [document is not None for document in kept] == [True, False, True]


def test_the_rule_for_duplicates_moves_no_document_to_another_split_or_fold():
    texts = [f"document {i}\n" for i in range(100)]
    by_rule = [admit_all(texts, folds=3, duplicates=rule)[0] for rule in ("exact", "spacing", "words")]
    places = [[(d.document_id, d.split, d.fold) for d in kept] for kept in by_rule]
    assert places[0] == places[1] == places[2]


def test_each_outcome_is_counted_and_its_first_document_named():
    screen = Screen(settings(), folds=0, seed=0)
    for document in (
        raw("text", name="one"),
        raw(" \n\t\x00", name="two"),
        raw("", name="three"),
        raw(None, name="four", problem="undecodable"),
        raw(None, name="five", problem="oversize"),
        raw(None, name="six", problem="malformed"),
        raw(None, name="seven", problem="malformed"),
        raw("text", name="eight"),
    ):
        screen.admit(document, source=SOURCE)
    assert screen.counts == {
        "kept": 1,
        "empty": 2,
        "undecodable": 1,
        "oversize": 1,
        "malformed": 2,
        "duplicate": 1,
    }
    assert screen.num_seen == 8
    for shown in ("1 of 8", "2 empty (first: two)", "1 undecodable (first: four)", "2 malformed (first: six)"):
        assert shown in screen.summary()
    assert "\n" not in screen.summary()


def test_summary_of_a_clean_corpus_names_no_problem():
    _, screen = admit_all(["one", "two"])
    assert screen.summary() == "corpus: 2 of 2 documents kept"


def test_withdrawn_document_counts_as_empty():
    (document,), screen = admit_all(["text"])
    screen.withdraw(document)
    assert (screen.counts["kept"], screen.counts["empty"], screen.num_seen) == (0, 1, 1)


def test_split_and_fold_depend_on_neither_order_nor_company():
    texts = [f"document {i}" for i in range(200)]
    forward, _ = admit_all(texts, folds=3)
    backward, _ = admit_all(texts[::-1], folds=3)
    alone = [admit_all([text], folds=3)[0][0] for text in texts]
    places = [(d.document_id, d.split, d.fold) for d in forward]
    assert places == [(d.document_id, d.split, d.fold) for d in backward[::-1]]
    assert places == [(d.document_id, d.split, d.fold) for d in alone]


def test_split_does_not_depend_on_source_group_or_number_of_folds():
    other = SOURCE.model_copy(update={"name": "other", "style": "ornate"})
    for i in range(100):
        document = RawDocument(name="x", text=f"document {i}", group="Bo", problem=None)
        first = Screen(settings(), folds=2, seed=5).admit(raw(f"document {i}"), source=SOURCE)
        second = Screen(settings(), folds=7, seed=5).admit(document, source=other)
        assert first.split == second.split


def test_holdout_takes_about_its_fraction_and_zero_takes_none():
    documents = ids(20_000)
    for fraction in (0.0, 0.1, 0.5):
        held = sum(assign_split(i, seed=3, holdout_fraction=fraction) == "test" for i in documents)
        spread = (20_000 * fraction * (1 - fraction)) ** 0.5
        assert abs(held - 20_000 * fraction) <= 4 * spread


def test_larger_fraction_only_adds_to_the_holdout():
    small = {i for i in ids(5000) if assign_split(i, seed=3, holdout_fraction=0.1) == "test"}
    large = {i for i in ids(5000) if assign_split(i, seed=3, holdout_fraction=0.3) == "test"}
    assert small < large


def test_another_seed_gives_another_holdout_and_other_folds():
    documents = ids(500)
    assert [assign_split(i, seed=0, holdout_fraction=0.5) for i in documents] != [
        assign_split(i, seed=1, holdout_fraction=0.5) for i in documents
    ]
    assert [assign_fold(i, seed=0, folds=2) for i in documents] != [assign_fold(i, seed=1, folds=2) for i in documents]


def test_folds_are_even_and_independent_of_the_holdout():
    documents = [i for i in ids(20_000) if assign_split(i, seed=0, holdout_fraction=0.5) == "train"]
    sizes = [sum(assign_fold(i, seed=0, folds=4) == fold for i in documents) for fold in range(4)]
    expected = len(documents) / 4
    assert all(abs(size - expected) < 4 * (expected * 0.75) ** 0.5 for size in sizes)


def test_held_out_documents_and_a_corpus_without_folds_have_fold_minus_one():
    held, _ = admit_all([f"document {i}" for i in range(50)], holdout_fraction=0.5)
    assert {d.fold for d in held if d.split == "test"} == {-1}
    assert {d.fold for d in held if d.split == "train"} == {0, 1}
    plain, _ = admit_all([f"document {i}" for i in range(50)], folds=0)
    assert {d.fold for d in plain} == {-1}


@pytest.mark.parametrize(("near", "documents", "limit"), [(False, 20_000, 160), (True, 1000, 3500)])
def test_screening_keeps_few_bytes_a_document(near, documents, limit):
    screen = Screen(settings(near_duplicates=near), folds=2, seed=0)
    tracemalloc.start()
    for i in range(documents):
        screen.admit(raw(f"{i} " * 50), source=SOURCE)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert screen.counts["kept"] == documents
    assert held / documents < limit
