import pytest

from softshard.evaluate.text import text_after
from softshard.models import load_tokenizer

TEXT = "Zoë paid 5 € — naïve, 日本語 and 🎉 too.\n"


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_pieces_put_together_are_the_text_wherever_the_windows_are_cut(tokenizer):
    ids = tokenizer.encode([TEXT])[0]
    for cut in range(1, len(ids)):
        first = text_after(tokenizer, ids[:cut], start=0)
        assert first + text_after(tokenizer, ids, start=cut) == TEXT
        assert "\ufffd" not in first


def test_an_end_of_text_token_has_no_text(tokenizer):
    ids = tokenizer.encode(["abc"])[0]
    assert text_after(tokenizer, [*ids, tokenizer.eos_id], start=1) == text_after(tokenizer, ids, start=1)
    assert text_after(tokenizer, [ids[0], tokenizer.eos_id], start=1) == ""


def test_ids_before_the_start_have_no_text(tokenizer):
    ids = tokenizer.encode(["one two three"])[0]
    assert text_after(tokenizer, ids, start=len(ids)) == ""
    assert text_after(tokenizer, [], start=0) == ""
