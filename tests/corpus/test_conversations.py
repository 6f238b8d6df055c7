"""Conversations cut at their turns: what fits is one sequence, and every answer is a label once at most."""

import json

import numpy as np
import pytest

from fakes.chat import TEMPLATES, chat_backend, turns
from fakes.events import Listener
from softshard.config import CorpusSettings
from softshard.corpus.build import build_corpus, corpus_key, count_corpus, first_sequences
from softshard.corpus.conversations import conversation_sequences
from softshard.corpus.read import iter_sequences
from softshard.corpus.render import load_chat_template
from softshard.corpus.screen import ScreenedDocument
from softshard.errors import ChatTemplateInvalid, SourceUnreadable, TooMuchLeftOut
from softshard.models import wrap_tokenizer
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role[0] + m.content }}<|im_end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
"""Every turn takes three tokens and those of its text."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return wrap_tokenizer(chat_backend(tiny_model), name="tiny")


def document(*views):
    return ScreenedDocument(
        document_id="d" * 32,
        name="a.jsonl, line 1",
        text="not looked at",
        num_bytes=13,
        source="talk",
        style="plain",
        group="Ada",
        split="train",
        fold=-1,
        views=tuple(tuple(view) for view in views),
    )


def cut(tokenizer, *views, context, overlap=1, template=TEMPLATE):
    chosen = load_chat_template(tokenizer, chosen=template)
    return conversation_sequences(document(*views), template=chosen, context_tokens=context, overlap_tokens=overlap)


def show(tokenizer, sequence):
    """A sequence as text, its labels in brackets."""
    shown, place = "", 0
    for start, stop in sequence.label_spans:
        decode = tokenizer.backend.decode
        shown += f"{decode(sequence.token_ids[place:start])}[{decode(sequence.token_ids[start:stop])}]"
        place = stop
    assert place == len(sequence.token_ids)
    return shown.replace("<|im_start|>", "").replace("<|im_end|>", ";")


def letters(text):
    """A turn of each letter, in which each is a token of its own for this tokenizer."""
    return turns(*text.split())


TALK = "QQ RR SS TTTT UU V WW XX"


@pytest.mark.parametrize(
    ("context", "overlap", "expected", "left_out"),
    [
        # Sizes by hand: 3 tokens of the template each, and the letters: Q5 R5 S5 T7 U5 V4 W5 X5, 41 in all.
        (41, 1, ["uQQ;a[RR;]uSS;a[TTTT;]uUU;a[V;]uWW;a[XX;]"], 0),
        (40, 1, ["uQQ;a[RR;]uSS;a[TTTT;]uUU;a[V;]", "uWW;a[XX;]"], 0),
        (31, 1, ["uQQ;a[RR;]uSS;a[TTTT;]uUU;a[V;]", "uWW;a[XX;]"], 0),
        (30, 1, ["uQQ;a[RR;]uSS;a[TTTT;]", "uUU;a[V;]uWW;a[XX;]"], 0),
        (30, 9, ["uQQ;a[RR;]uSS;a[TTTT;]", "uUU;a[V;]uWW;a[XX;]"], 0),
        (31, 9, ["uQQ;a[RR;]uSS;a[TTTT;]uUU;a[V;]", "uUU;aV;uWW;a[XX;]"], 0),
        (12, 1, ["uQQ;a[RR;]", "uSS;a[TTTT;]", "uUU;a[V;]", "uWW;a[XX;]"], 0),
        (11, 1, ["uQQ;a[RR;]", "uUU;a[V;]", "uWW;a[XX;]"], 1),
        (9, 1, ["uUU;a[V;]"], 3),
        (8, 1, [], 4),
    ],
)
def test_a_conversation_is_cut_at_its_turns(context, overlap, expected, left_out, tokenizer):
    sequences, num_left_out = cut(tokenizer, letters(TALK), context=context, overlap=overlap)
    assert [show(tokenizer, sequence) for sequence in sequences] == expected
    assert num_left_out == left_out
    lengths = [len(sequence.token_ids) for sequence in sequences]
    assert [sequence.start for sequence in sequences] == [sum(lengths[:index]) for index in range(len(lengths))]


def test_every_sequence_has_the_system_prompt(tokenizer):
    given = turns(*TALK.split(), system="Y")
    sequences, _ = cut(tokenizer, given, context=35)
    shown = [show(tokenizer, sequence) for sequence in sequences]
    assert shown == ["sY;uQQ;a[RR;]uSS;a[TTTT;]uUU;a[V;]", "sY;uWW;a[XX;]"]


def test_the_oldest_turns_go_first_where_the_only_label_is_far(tokenizer):
    (sequence,), left_out = cut(tokenizer, turns(*TALK.split(), last=True), context=20)
    assert show(tokenizer, sequence) == "uUU;aV;uWW;a[XX;]"
    assert left_out == 0


def test_what_follows_the_last_answer_is_left_out(tokenizer):
    (sequence,), _ = cut(tokenizer, turns("QQ", "RR", "SS"), context=41)
    assert show(tokenizer, sequence) == "uQQ;a[RR;]"


def test_a_view_of_each_person_follows_the_other(tokenizer):
    sequences, _ = cut(tokenizer, turns("QQ", "RR"), turns("RR", "SS"), context=41)
    assert [show(tokenizer, sequence) for sequence in sequences] == ["uQQ;a[RR;]", "uRR;a[SS;]"]
    assert [sequence.start for sequence in sequences] == [0, 10]
    assert len({sequence.sequence_id for sequence in sequences}) == 2


@pytest.mark.parametrize("context", range(8, 100, 7))
@pytest.mark.parametrize("name", ["chatml", "llama3", "phi", "marked"])
def test_every_answer_is_a_label_once_or_left_out(name, context, tokenizer):
    words = [f"{'word ' * (index * 7 % 5)}{index}." for index in range(14)]
    given = turns(*words)
    sequences, left_out = cut(tokenizer, given, context=context, overlap=4, template=str(TEMPLATES / f"{name}.jinja"))
    labels = [
        tokenizer.backend.decode(sequence.token_ids[start:stop], skip_special_tokens=True)
        for sequence in sequences
        for start, stop in sequence.label_spans
    ]
    assert len(labels) == len(set(labels)) == 7 - left_out
    assert set(labels) <= set(words[1::2])
    assert all(len(sequence.token_ids) <= context for sequence in sequences)


def test_another_rendering_of_a_conversation_is_another_sequence(tokenizer):
    names = ["chatml", "marked"]
    found = [
        cut(tokenizer, turns("QQ", "RR"), context=99, template=str(TEMPLATES / f"{name}.jinja"))[0][0] for name in names
    ]
    assert found[0].document_id == found[1].document_id
    assert found[0].sequence_id != found[1].sequence_id


def rows(path, *conversations):
    path.write_text("".join(json.dumps({"messages": given}) + "\n" for given in conversations))
    return path


def said(*words):
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def settings(path, *, chat_template=TEMPLATE, context=41, **changes):
    source = {"name": "talk", "uri": str(path), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    values = {"sources": [{**source, "layout": "messages", **changes}], "holdout_fraction": 0, "overlap_tokens": 1}
    return CorpusSettings.model_validate(
        {**values, "context_tokens": context, "chat_template": chat_template, "max_left_out": 0.9}
    )


def build(path, out, tokenizer, *, reporter=None, **changes):
    asked = {"settings": settings(path, **changes), "tokenizer": tokenizer, "folds": 0, "seed": 1}
    reporter = reporter or SilentReporter()
    manifest = build_corpus(**asked, store=LocalStore(out), reporter=reporter)
    assert count_corpus(**asked, reporter=SilentReporter()).counts == manifest.counts
    return manifest, list(iter_sequences(LocalStore(out), manifest, split=None))


def test_a_corpus_of_conversations_has_their_sequences_and_counts(tmp_path, tokenizer):
    path = rows(tmp_path / "a.jsonl", said("QQ", "RR"), said("QQ", "RR"), said("SS", "TTTT", "UU", "V"))
    manifest, sequences = build(path, tmp_path / "out", tokenizer, answers="last")
    assert [show(tokenizer, sequence) for sequence in sequences] == ["uQQ;a[RR;]", "uSS;aTTTT;uUU;a[V;]"]
    assert {name: count for name, count in manifest.counts.items() if count} == {"kept": 2, "duplicate": 1}
    (statistics,) = manifest.statistics
    # QQ 5 and RR 5; SS 5, TTTT 7, UU 5, V 4: labels are an answer's letters and its end.
    assert (statistics.num_documents, statistics.num_tokens, statistics.num_labels) == (2, 31, 3 + 2)
    assert (statistics.num_sequences, statistics.max_tokens) == (2, 21)


def test_what_cannot_be_rendered_is_counted_with_its_reason(tmp_path, tokenizer):
    path = rows(tmp_path / "a.jsonl", said("QQ", "RR"), said("QQ", "T" * 60), said("U", ""), said("V", "W", "X", "Y"))
    template = TEMPLATE.replace(
        "%}", "%}{% if messages[0].content == 'V' %}{{ raise_exception('no V') }}{% endif %}", 1
    )
    manifest, sequences = build(path, tmp_path / "out", tokenizer, chat_template=template)
    assert [show(tokenizer, sequence) for sequence in sequences] == ["uQQ;a[RR;]"]
    assert {name: count for name, count in manifest.counts.items() if count} == {
        "kept": 1,
        "oversize": 1,
        "malformed": 2,
    }
    chosen = settings(path, chat_template=template).model_copy(update={"max_left_out": 0.3})
    with pytest.raises(
        TooMuchLeftOut, match=r"2 of its 4 .* line 3: .* is empty\); check the source's `layout`, `roles`"
    ):
        count_corpus(settings=chosen, tokenizer=tokenizer, folds=0, seed=1, reporter=SilentReporter())
    only = rows(tmp_path / "b.jsonl", said("V", "W"))
    with pytest.raises(SourceUnreadable, match=r"b.jsonl, line 1: the chat template refuses it: no V"):
        build(only, tmp_path / "other", tokenizer, chat_template=template)


def test_answers_that_are_too_long_are_named(tmp_path, tokenizer):
    reporter = Listener()
    path = rows(tmp_path / "a.jsonl", said("QQ", "RR"), said("QQ", "T" * 60, "UU", "V"))
    asked = {"settings": settings(path), "tokenizer": tokenizer, "seed": 1}
    sequences = first_sequences(**asked, num_tokens=99)
    assert [show(tokenizer, sequence) for sequence in sequences] == ["uQQ;a[RR;]", "uUU;a[V;]"]
    count_corpus(**asked, folds=0, reporter=reporter)
    assert reporter.said[0] == (
        "source 'talk': 1 answer left out, too long for `corpus.context_tokens` with the question"
        f" (first: file://{path}, line 2)"
    )


def test_texts_and_conversations_make_one_corpus(tmp_path, tokenizer):
    path = rows(tmp_path / "a.jsonl", said("QQ", "RR"))
    path.write_text(json.dumps({"text": "Plain."}) + "\n" + path.read_text() + json.dumps({"text": "Text."}) + "\n")
    _, sequences = build(path, tmp_path / "out", tokenizer, layout="auto")
    assert [show(tokenizer, sequence) for sequence in sequences] == [
        "P[lain.</s>]",
        "uQQ;a[RR;]",
        "T[ext.</s>]",
    ]


def test_spelling_a_special_token_changes_no_other_token(tmp_path, tokenizer):
    path = rows(tmp_path / "a.jsonl", said("<|im_end|>", "RR<|im_start|>"))
    _, (sequence,) = build(path, tmp_path / "out", tokenizer, context=99)
    ids = tokenizer.backend.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [int(np.sum(sequence.token_ids == token)) for token in ids] == [2, 2]


def test_a_corpus_is_made_anew_with_another_template_and_texts_are_not(tmp_path, tokenizer):
    path = rows(tmp_path / "a.jsonl", said("QQ", "RR"))
    asked = {"tokenizer": tokenizer, "folds": 0, "seed": 1}
    keys = [
        corpus_key(settings(path, layout=layout, chat_template=template), **asked)
        for layout in ("messages", "text")
        for template in (TEMPLATE, TEMPLATE + "!")
    ]
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]


def test_conversations_without_a_template_are_refused_before_anything_is_read(tmp_path, tokenizer):
    with pytest.raises(ChatTemplateInvalid, match="the tokenizer of the model has none; give `chat_template` the text"):
        build(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, chat_template=None)
