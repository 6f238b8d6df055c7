"""Tokenizers that differ: what still means the same, and what is said where it does not."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from fakes.tiny import save_tiny_model
from softshard.cli import main
from softshard.errors import ModelInvalid, TokenizerMismatch
from softshard.models import check_tokenizer, load_tokenizer
from softshard.shard.manifest import read_manifest


def variant(model, folder, *, special=(), plain=(), eos="<|end|>", bos=None):
    """A copy of a model whose tokenizer has further tokens, added in this order, or other ends."""
    shutil.copytree(model, folder)
    backend = PreTrainedTokenizerFast.from_pretrained(model)
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False) for token in plain])
    backend.eos_token, backend.bos_token = eos, bos
    backend.save_pretrained(folder)
    return folder


def compare(data, model, *, at_hand):
    check_tokenizer(
        model,
        model="the model",
        data="the data",
        data_fingerprint=data.fingerprint,
        made_with=data if at_hand else None,
    )


def test_a_fingerprint_is_the_digest_of_definition_and_ends(tiny_model):
    definition = json.loads((tiny_model / "tokenizer.json").read_text())
    del definition["truncation"], definition["padding"]
    text = json.dumps([definition, None, 0], sort_keys=True, ensure_ascii=False)
    assert load_tokenizer(tiny_model).fingerprint == hashlib.sha256(text.encode()).hexdigest()


CHAT = ("<|im_start|>", "<|im_end|>")
SAME = {
    "another end, as a base model and its chat model have": ({"special": CHAT}, {"special": CHAT, "eos": CHAT[1]}),
    "one more special token in the model": ({"special": CHAT}, {"special": (*CHAT, "[PAD]")}),
    "more tokens and another end": ({}, {"special": CHAT, "eos": CHAT[1]}),
}


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_a_tokenizer_whose_ids_mean_the_same_is_accepted(name, at_hand, tiny_model, tmp_path):
    of_data, of_model = SAME[name]
    data = load_tokenizer(variant(tiny_model, tmp_path / "data", **of_data))
    model = load_tokenizer(variant(tiny_model, tmp_path / "model", **of_model))
    assert data.fingerprint != model.fingerprint
    compare(data, model, at_hand=at_hand)


def test_a_model_may_lack_a_special_token_of_the_data_that_is_in_no_text(tiny_model, tmp_path):
    data = load_tokenizer(variant(tiny_model, tmp_path / "data", special=CHAT))
    compare(data, load_tokenizer(tiny_model), at_hand=True)
    with pytest.raises(TokenizerMismatch, match="was made with tokenizer"):
        compare(data, load_tokenizer(tiny_model), at_hand=False)


def test_a_model_may_not_lack_the_token_that_ends_documents(tiny_model, tmp_path):
    data = load_tokenizer(variant(tiny_model, tmp_path / "data", special=CHAT, eos=CHAT[1]))
    with pytest.raises(TokenizerMismatch, match=r": id 301 is '<\|im_end\|>' in the data and no token in the model"):
        compare(data, load_tokenizer(tiny_model), at_hand=True)


def test_the_first_id_that_means_something_else_is_named(tiny_model, tmp_path):
    data = load_tokenizer(variant(tiny_model, tmp_path / "data", special=("<|user|>", "<|system|>")))
    model = load_tokenizer(variant(tiny_model, tmp_path / "model", special=("<|user|>", "<|tool|>")))
    with pytest.raises(
        TokenizerMismatch, match=r": id 301 is '<\|system\|>' in the data and '<\|tool\|>' in the model"
    ):
        compare(data, model, at_hand=True)
    other = load_tokenizer(save_tiny_model(tmp_path / "other", words=("quince",) * 400))
    with pytest.raises(TokenizerMismatch, match=r": id \d+ is .* in the data and .* in the model; use a model"):
        compare(load_tokenizer(tiny_model), other, at_hand=True)
    with pytest.raises(TokenizerMismatch):
        compare(load_tokenizer(tiny_model), other, at_hand=False)


@pytest.fixture
def full(tmp_path):
    """A model with logits for exactly its 300 tokens."""
    return save_tiny_model(tmp_path / "full", vocab_size=300)


def test_a_special_token_beyond_the_logits_of_a_model_is_in_no_text_and_in_no_target(full, tiny_job, tmp_path):
    model = variant(full, tmp_path / "model", special=("<image_soft_token>", "[PAD]"))
    job = tiny_job(tmp_path, teacher={"model": str(model), "folds": 0}, train={"retention": None, "baseline": None})
    assert main(["corpus", str(job), "--quiet"]) == 0
    assert main(["targets", str(job), "--quiet"]) == 0
    assert read_manifest(tmp_path / "out/targets").vocab_size == 300
    assert main(["train", str(job), "--quiet"]) == 0


def test_a_text_with_a_token_beyond_the_logits_is_refused_by_name(full, tiny_job, tmp_path, capsys):
    model = variant(full, tmp_path / "model", plain=("harbour",))
    job = tiny_job(tmp_path, teacher={"model": str(model), "folds": 0}, train={"retention": None, "baseline": None})
    capsys.readouterr()
    assert main(["corpus", str(job), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "the text has its token 'harbour' with the id 300, and it has logits for 300 tokens" in line


def test_an_end_beyond_the_logits_is_refused(full, tmp_path):
    model = variant(full, tmp_path / "model", special=("<|im_end|>",), eos="<|im_end|>")
    with pytest.raises(ModelInvalid, match=r"'<\|im_end\|>', which ends a document, has the id 300"):
        load_tokenizer(model)
