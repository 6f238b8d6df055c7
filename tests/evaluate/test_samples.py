from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from softshard.errors import HoldoutEmpty
from softshard.evaluate.samples import Prompt, generate, human_continuations, make_prompts
from softshard.models import load_model, load_tokenizer
from softshard.sketch.types import TokenSequence

V = 300


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, dtype=torch.float32, device="cpu")


class Watched:
    """A model whose logits are kept, and may be changed on the way out: change(step, logits)."""

    def __init__(self, model, change=lambda step, logits: logits):
        self.model, self.change, self.logits = model, change, []

    def __call__(self, **inputs):
        out = self.model(**inputs)
        logits = self.change(len(self.logits), out.logits.clone())
        self.logits.append(logits[:, -1])
        return SimpleNamespace(logits=logits, past_key_values=out.past_key_values)


def prompts_of(tokenizer, *texts):
    return [
        Prompt(sequence_id=f"id-{n}", token_ids=tuple(tokenizer.encode([text])[0]), human_continuation=())
        for n, text in enumerate(texts)
    ]


def sample(model, prompts, tokenizer, *, sample_tokens=12, temperature=1.0, seed=1):
    return generate(
        model,
        prompts,
        tokenizer=tokenizer,
        sample_tokens=sample_tokens,
        temperature=temperature,
        seed=seed,
        device="cpu",
    )


def no_end(step, logits):
    logits[..., 0] = -torch.inf
    return logits


def test_cached_and_padded_decoding_gives_the_distribution_of_the_full_forward_pass(model, tokenizer):
    prompts = prompts_of(tokenizer, "The harbour", "She counted the coins twice; there were nine", "Rain")
    watched = Watched(model, no_end)
    samples = sample(watched, prompts, tokenizer)
    assert len({len(prompt.token_ids) for prompt in prompts}) == 3, "two of them are padded"
    for row, (prompt, drawn) in enumerate(zip(prompts, samples.continuations.token_ids, strict=True)):
        with torch.no_grad():
            direct = model(torch.tensor([[*prompt.token_ids, *drawn]])).logits[0]
        assert len(drawn) == len(watched.logits) == 12
        for step, logits in enumerate(watched.logits):
            expected = direct[len(prompt.token_ids) - 1 + step, 1:]
            torch.testing.assert_close(logits[row, 1:], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_as_often_as_the_model_says(model, tokenizer, temperature):
    from scipy.stats import chisquare

    ids = tuple(tokenizer.encode(["He never said"])[0])
    prompts = [Prompt(sequence_id=str(n), token_ids=ids, human_continuation=()) for n in range(1280)]
    samples = sample(model, prompts, tokenizer, sample_tokens=1, temperature=temperature)
    drawn = [one[0] if one else tokenizer.eos_id for one in samples.continuations.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1, :V].double()
    expected = len(prompts) * torch.softmax(logits / temperature, 0).numpy()
    seen = np.bincount(drawn, minlength=V)
    rare = expected < 5
    observed = [*seen[~rare], seen[rare].sum()]
    assert chisquare(observed, [*expected[~rare], expected[rare].sum()]).pvalue > 1e-3


def test_random_numbers_depend_on_the_beginning_and_the_seed_alone(model, tokenizer):
    prompts = prompts_of(tokenizer, "The dog would", "Bread", "Somebody had painted the")
    together = sample(model, prompts, tokenizer).continuations.token_ids
    alone = [sample(model, [prompt], tokenizer).continuations.token_ids[0] for prompt in prompts]
    assert list(together) == alone
    assert sample(model, prompts[::-1], tokenizer).continuations.token_ids == together[::-1]
    assert sample(model, prompts, tokenizer, seed=2).continuations.token_ids != together


def test_more_prompts_than_a_batch_holds_change_nothing(model, tokenizer):
    ids = tuple(tokenizer.encode(["A letter"])[0])
    prompts = [Prompt(sequence_id=str(n), token_ids=ids, human_continuation=()) for n in range(70)]
    many = sample(model, prompts, tokenizer, sample_tokens=3).continuations.token_ids
    assert len(many) == 70
    assert sample(model, prompts[60:], tokenizer, sample_tokens=3).continuations.token_ids == many[60:]


def test_ids_beyond_the_vocabulary_are_never_drawn(model, tokenizer):
    def padding_wins(step, logits):
        logits[..., V:] = 100.0
        return logits

    samples = sample(Watched(model, padding_wins), prompts_of(tokenizer, "When the band"), tokenizer)
    assert all(token < V for token in samples.continuations.token_ids[0])


def test_a_continuation_stops_before_the_end_of_text_token(model, tokenizer):
    def ends_at_third(step, logits):
        logits[..., 0] = -torch.inf
        logits[0, :, 0] = 1000.0 if step == 3 else -torch.inf
        return logits

    watched = Watched(model, ends_at_third)
    samples = sample(watched, prompts_of(tokenizer, "The", "In the back"), tokenizer)
    assert [len(ids) for ids in samples.continuations.token_ids] == [3, 12]
    assert samples.num_ended == 1
    assert samples.num_sequence_steps == 11 * 2


def test_decoding_stops_when_all_have_ended(model, tokenizer):
    def ends_at_once(step, logits):
        logits[..., 0] = 1000.0
        return logits

    watched = Watched(model, ends_at_once)
    samples = sample(watched, prompts_of(tokenizer, "The", "In"), tokenizer)
    assert len(watched.logits) == 1
    assert samples.continuations.texts == ("", "")
    assert samples.ms_per_token == 0


def test_time_is_shared_by_the_sequences_of_a_step(model, tokenizer):
    samples = sample(Watched(model, no_end), prompts_of(tokenizer, "The", "In the"), tokenizer)
    assert samples.decode_seconds > 0
    assert samples.ms_per_token == pytest.approx(1000 * samples.decode_seconds / (2 * 11))


def test_texts_are_those_of_the_tokens_after_the_beginning(model, tokenizer):
    prompts = prompts_of(tokenizer, "They argued about")
    samples = sample(model, prompts, tokenizer)
    whole = tokenizer.decode([*prompts[0].token_ids, *samples.continuations.token_ids[0]])
    assert whole.rstrip("\ufffd") == "They argued about" + samples.continuations.texts[0]


def test_an_attached_adapter_is_sampled_from(tiny_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    watched = Watched(adapted, no_end)
    prompts = prompts_of(tokenizer, "The teacher wrote")
    drawn = sample(watched, prompts, tokenizer).continuations.token_ids[0]
    with torch.no_grad():
        direct = adapted(torch.tensor([[*prompts[0].token_ids, *drawn]])).logits[0]
    last = len(prompts[0].token_ids) + len(drawn) - 2
    torch.testing.assert_close(watched.logits[-1][0, 1:], direct[last, 1:], atol=2e-5, rtol=1e-5)


def row(document, start, length, first=100, label_spans=None):
    sequence = TokenSequence(
        sequence_id=f"{document}@{start}",
        document_id=document,
        source="s",
        style="t",
        group="g",
        start=start,
        token_ids=np.arange(first, first + length, dtype=np.int32),
        label_spans=label_spans or ((1, length),),
    )
    return ((sequence, None), None)


def beginnings(rows, **changes):
    settings = {"num_samples": 5, "prompt_tokens": 4, "sample_tokens": 10, "seed": 0}
    return make_prompts(rows, **(settings | changes))


def test_a_beginning_is_the_first_tokens_of_a_document_and_what_follows():
    (prompt,) = beginnings([row("a", 0, 30), row("a", 26, 30)])
    assert prompt.sequence_id == "a@0"
    assert prompt.token_ids == (100, 101, 102, 103)
    assert prompt.human_continuation == tuple(range(104, 114))


def test_only_documents_with_enough_to_follow_are_begun():
    chosen = beginnings([row("short", 0, 11), row("just", 0, 12), row("later", 8, 40)])
    assert [prompt.sequence_id for prompt in chosen] == ["just@0"]
    assert len(chosen[0].human_continuation) == 8


def test_a_continuation_ends_where_the_labels_do():
    assert beginnings([row("whole", 0, 40, label_spans=((1, 13), (20, 40)))])[0].human_continuation == (
        *range(104, 113),
    )
    with pytest.raises(HoldoutEmpty):
        beginnings([row("question", 0, 40, label_spans=((1, 4), (5, 40)))])


def test_the_prompt_of_a_conversation_is_all_before_its_first_answer():
    rows = [
        row("answer", 0, 40, label_spans=((6, 26), (30, 40))),
        row("brief", 0, 40, label_spans=((20, 22),)),
        row("far", 0, 40, label_spans=((31, 40),)),
        row("later", 40, 40, label_spans=((3, 40),)),
    ]
    chosen = {prompt.sequence_id: prompt for prompt in beginnings(rows, context_tokens=40)}
    assert {name: len(prompt.token_ids) for name, prompt in chosen.items()} == {"answer@0": 6, "brief@0": 20}
    assert chosen["answer@0"].human_continuation == tuple(range(106, 116))
    assert chosen["brief@0"].human_continuation == (120, 121)
    assert {name: prompt.end_id for name, prompt in chosen.items()} == {"answer@0": 125, "brief@0": 121}


def test_an_answer_ends_with_its_own_token(model, tokenizer):
    prompts = prompts_of(tokenizer, "The harbour", "Rain")
    whole = sample(Watched(model, no_end), prompts, tokenizer)
    drawn = whole.continuations.token_ids
    assert whole.num_ended == 0
    ended = [replace(prompt, end_id=ids[3]) for prompt, ids in zip(prompts, drawn, strict=True)]
    found = sample(Watched(model, no_end), ended, tokenizer)
    expected = tuple(ids[: ids.index(ids[3])] for ids in drawn)
    assert (found.continuations.token_ids, found.num_ended) == (expected, 2)
    people = [replace(prompt, human_continuation=ids) for prompt, ids in zip(ended, drawn, strict=True)]
    assert human_continuations(people, tokenizer=tokenizer).token_ids == expected


def test_the_choice_depends_on_ids_and_seed_and_not_on_the_order_of_rows():
    rows = [row(f"d{n}", 0, 20) for n in range(40)]
    chosen = beginnings(rows)
    assert len(chosen) == len({prompt.sequence_id for prompt in chosen}) == 5
    assert beginnings(rows[::-1]) == chosen
    assert beginnings(rows, num_samples=3) == chosen[:3]
    assert beginnings(rows, seed=1) != chosen


def test_no_beginning_at_all_is_named_with_the_way_out():
    with pytest.raises(HoldoutEmpty, match=r"evaluate\.prompt_tokens"):
        beginnings([row("a", 0, 11)])


def test_human_continuations_have_no_end_of_text_token(tokenizer):
    ids = tokenizer.encode(["It was short, it was polite"])[0]
    prompt = Prompt(sequence_id="x", token_ids=tuple(ids[:3]), human_continuation=(*ids[3:], tokenizer.eos_id))
    human = human_continuations([prompt], tokenizer=tokenizer)
    assert human.token_ids == (tuple(ids[3:]),)
    assert tokenizer.decode(ids[:3]) + human.texts[0] == "It was short, it was polite"
