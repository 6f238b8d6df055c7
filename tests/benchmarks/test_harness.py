import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import harness
from benchmarks.harness import runner
from softshard.errors import JobInvalid


@pytest.fixture
def cache(tmp_path, tiny_model, texts):
    """Materials as jobs/materials.py leaves them: the first speech has several windows, the others one each."""
    shutil.copytree(tiny_model, tmp_path / "SmolLM2-135M-Instruct")
    speeches = [" ".join(texts * 2), *(f"{text} {text}" for text in texts)]
    rows = [{"text": text, "id": str(index), "group": "0"} for index, text in enumerate(speeches)]
    (tmp_path / "speeches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("SmolLM2-135M-Instruct", "speeches.jsonl"):
        (tmp_path / f"{name}.stamp").write_text("{}")
    return tmp_path


def documents(cache):
    """Token ids of each speech, closed."""
    tokenizer = AutoTokenizer.from_pretrained(cache / "SmolLM2-135M-Instruct")
    rows = [json.loads(line) for line in (cache / "speeches.jsonl").read_text().splitlines()]
    return [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows]


def whole_model(cache):
    return AutoModelForCausalLM.from_pretrained(cache / "SmolLM2-135M-Instruct", dtype=torch.float32).eval()


def test_every_token_but_a_speechs_first_is_one_label_in_the_order_of_the_text(cache):
    labels = [token for document in documents(cache) for token in document[1:]]
    found = harness.positions("small", num_positions=len(labels), cache=cache)
    assert found.labels.tolist() == labels
    assert len(found.places) == len(set(found.places)) == len(labels)


def test_logits_are_those_of_the_whole_model_without_its_padding(cache):
    (first, *_) = documents(cache)
    assert len(first) > 512
    found = harness.positions("small", num_positions=700, cache=cache)

    with torch.no_grad():
        opening = whole_model(cache)(torch.tensor([first[:512]])).logits[0, :-1, : found.vocab_size]
        second = whole_model(cache)(torch.tensor([first[448:960]])).logits[0, 63:-1, : found.vocab_size]

    assert found.vocab_size == 300
    torch.testing.assert_close(found.logits(0, 511), opening, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits(511, 700), second[:189], rtol=1e-4, atol=1e-4)


def test_middle_states_are_those_between_two_layers(cache):
    (first, *_) = documents(cache)
    with torch.no_grad():
        output = whole_model(cache).model(torch.tensor([first[:512]]), output_hidden_states=True)
    found = harness.middle_states("small", layer=1, num_positions=300, cache=cache)
    torch.testing.assert_close(found, output.hidden_states[1][0, :300], rtol=1e-5, atol=1e-5)


def test_the_first_positions_are_the_same_however_many_are_asked_for(cache, capsys):
    many = harness.positions("small", num_positions=900, cache=cache)
    assert "scoring" in capsys.readouterr().out

    few = harness.positions("small", num_positions=20, cache=cache)

    assert "scoring" not in capsys.readouterr().out
    assert torch.equal(few.states, many.states[:20])
    assert torch.equal(few.labels, many.labels[:20])
    assert few.places == many.places[:20]
    assert (few.uniforms(seed=3, num_draws=2) == many.uniforms(seed=3, num_draws=2)[:, :20]).all()


def test_another_models_states_are_not_taken_from_the_cache(cache, capsys):
    harness.positions("small", num_positions=20, cache=cache)
    (cache / "SmolLM2-135M-Instruct.stamp").write_text('{"made_from": "another file"}')
    capsys.readouterr()
    harness.positions("small", num_positions=20, cache=cache)
    assert "scoring" in capsys.readouterr().out


def test_a_missing_material_is_named_with_the_command_that_makes_it(cache):
    with pytest.raises(JobInvalid, match=r"Qwen2\.5.*materials\.py large-model"):
        harness.positions("large", num_positions=20, cache=cache)


def test_more_positions_than_the_text_has_are_refused(cache):
    num_positions = sum(len(document) - 1 for document in documents(cache))
    with pytest.raises(JobInvalid, match=f"has {num_positions} positions, {num_positions + 1} were asked for"):
        harness.positions("small", num_positions=num_positions + 1, cache=cache)


def test_candidates_are_timed_in_alternation_and_the_least_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    calls = []

    seconds = harness.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)

    assert calls == ["a", "b", "a", "b"]
    assert seconds == {"a": 2.0, "b": 1.0}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`run` of a benchmark with these arguments, its records below tmp_path."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")

    def call(measure, *arguments):
        monkeypatch.setattr(sys, "argv", ["lakes", *arguments])
        return harness.run("lakes", measure)

    return call


def deep(options):
    harness.say("measuring")
    return harness.Result(figures={"depth": 7.5}, details={"lakes": ["Attersee"]})


def test_the_last_line_is_the_figures_and_a_quick_run_leaves_no_record(command, tmp_path, capsys):
    assert command(deep, "--quick") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"depth": 7.5}
    assert not (tmp_path / "results").exists()


def test_a_full_run_records_figures_machine_commit_and_command(command, tmp_path, capsys):
    assert command(deep) == 0

    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"depth": 7.5}
    record = json.loads((tmp_path / "results/lakes.json").read_text())
    assert (record["figures"], record["details"]) == ({"depth": 7.5}, {"lakes": ["Attersee"]})
    assert record["command"] == "python -m benchmarks.lakes"
    assert record["machine"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(record) == {"command", "commit", "seconds", "machine", "figures", "details"}


def test_a_wrong_answer_ends_the_run_without_figures(command, tmp_path, capsys):
    def wrong(options):
        harness.require(1 + 1 == 3, "one and one are three")

    with pytest.raises(harness.WrongAnswer, match="one and one are three"):
        command(wrong)
    assert "{" not in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_a_missing_material_ends_with_2_on_one_line(command, cache, capsys):
    def measure(options):
        return harness.positions("large", num_positions=20, cache=options.cache)

    assert command(measure, "--cache", str(cache)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lakes: ")
