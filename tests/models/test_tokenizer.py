"""Texts are encoded as transformers' own call encodes them."""

import pytest

from softshard.models import load_tokenizer

TEXTS = [
    "",
    " ",
    "A letter.\n\nAnother one, of 1961.",
    "ends with </s> and <unk> spelled out",
    "é å 漢字 \U0001f40b",
    "x" * 5000,
]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def call(tokenizer, texts):
    return tokenizer.backend(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_ids_are_those_of_transformers(tokenizer):
    assert tokenizer.encode(TEXTS) == call(tokenizer, TEXTS)
    assert tokenizer.encode([]) == []


def test_an_earlier_call_with_other_settings_changes_nothing(tokenizer):
    ids = call(tokenizer, TEXTS)
    special = tokenizer.backend.eos_token
    assert tokenizer.backend(special, add_special_tokens=False)["input_ids"] == [tokenizer.eos_id]
    tokenizer.backend(TEXTS, truncation=True, max_length=3)
    assert tokenizer.encode(TEXTS) == ids
    assert tokenizer.encode([special])[0] != [tokenizer.eos_id]
