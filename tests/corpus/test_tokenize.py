import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softshard.corpus.tokenize import encode_texts
from softshard.models import load_tokenizer, wrap_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def prefixing_tokenizer(texts):
    """Marks the beginning of whatever it is given, as sentence-piece models do: no text of it can be cut unnoticed."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"]))
    return wrapped(backend, name="prefixing")


BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPACES = normalizers.Replace(" ", "▁")
WHOLE = {
    "llama": (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),
    "mistral": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "gemma": (SPACES, pre_tokenizers.Split(" ", behavior="merged_with_previous")),
}


@pytest.fixture(scope="module", params=WHOLE)
def whole_text_tokenizer(texts, request):
    """Tokenises a text as one word, with a byte for what is not in its vocabulary."""
    normalizer, pre_tokenizer = WHOLE[request.param]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *BYTES], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    backend = Backend.from_str(json.dumps(definition))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    return wrapped(backend, name=request.param)


def wrapped(backend, *, name):
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    return wrap_tokenizer(fast, name=name)


class Recording:
    """A tokenizer that remembers how long the texts were that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest = tokenizer, 0

    @property
    def backend(self):
        return self.tokenizer.backend

    def encode(self, texts):
        self.longest = max([self.longest, *map(len, texts)])
        return self.tokenizer.encode(texts)


def long_text(texts, *, joint, seed=0):
    chosen = random.Random(seed).choices(texts, k=60)
    return joint.join(chosen)


@pytest.mark.parametrize("joint", [" ", "\n", "\n\n  ", "...\t", "", "、的", "'s ünïcode—"])
def test_long_text_in_pieces_has_the_ids_of_the_whole(tokenizer, texts, joint):
    text = long_text(texts, joint=joint)
    (whole,) = tokenizer.encode([text])
    recording = Recording(tokenizer)
    (ids,) = encode_texts([text], tokenizer=recording, piece_characters=400)
    assert ids.tolist() == whole
    assert ids.dtype == np.int32
    assert recording.longest <= 1200 < len(text)


def test_text_of_a_tokenizer_that_marks_beginnings_is_not_cut(prefixing_tokenizer, texts):
    text = long_text(texts, joint=" ")
    (whole,) = prefixing_tokenizer.encode([text])
    (ids,) = encode_texts([text], tokenizer=prefixing_tokenizer, piece_characters=400)
    assert ids.tolist() == whole


@pytest.mark.parametrize("joint", [" ", "\n", "\n\n  ", "...\t", "", "、的", "'s ünïcode—", "▁▁", "</s>", "\u00a0🙂 "])
def test_long_text_of_a_tokenizer_without_words_has_the_ids_of_the_whole(whole_text_tokenizer, texts, joint):
    text = long_text(texts, joint=joint)
    (whole,) = whole_text_tokenizer.encode([text])
    recording = Recording(whole_text_tokenizer)
    (ids,) = encode_texts([text], tokenizer=recording, piece_characters=400)
    assert ids.tolist() == whole
    assert recording.longest <= 1200 < len(text)


def test_words_that_no_token_parts_are_cut_elsewhere_and_what_cannot_be_cut_is_whole(whole_text_tokenizer, texts):
    letters = "".join(character for character in long_text(texts, joint="") if character.isalpha())
    recording = Recording(whole_text_tokenizer)
    (ids,) = encode_texts([letters], tokenizer=recording, piece_characters=400)
    assert ids.tolist() == whole_text_tokenizer.encode([letters])[0]
    assert recording.longest <= 1200 < len(letters)
    same = "ee" * 2500
    (ids,) = encode_texts([same], tokenizer=recording, piece_characters=400)
    assert ids.tolist() == whole_text_tokenizer.encode([same])[0]


def test_text_without_an_end_of_a_word_is_not_cut(tokenizer):
    text = "x" * 5000
    (ids,) = encode_texts([text], tokenizer=tokenizer, piece_characters=400)
    assert ids.tolist() == tokenizer.encode([text])[0]


def test_short_and_long_texts_keep_their_order(tokenizer, texts):
    mixed = [texts[0], long_text(texts, joint=" "), "", texts[1], long_text(texts, joint="\n", seed=1)]
    found = encode_texts(mixed, tokenizer=tokenizer, piece_characters=400)
    assert [tokenizer.decode(ids.tolist()) for ids in found] == mixed
