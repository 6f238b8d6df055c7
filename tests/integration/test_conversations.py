"""A whole run on conversations: from rows of messages to an adapter and its report."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from fakes.chat import TEMPLATES, chat_backend
from fakes.tiny import TEXTS
from softshard.cli import main
from softshard.models import load_tokenizer
from softshard.shard.manifest import read_manifest
from softshard.shard.read import read_rows
from softshard.storage import LocalStore


@pytest.fixture
def model(tiny_model, tmp_path):
    """The tiny model with a chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "chat-model")
    backend = chat_backend(folder)
    backend.chat_template = (TEMPLATES / "chatml.jinja").read_text()
    backend.save_pretrained(folder)
    return folder


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "talk.jsonl"
    rows = []
    for index in range(30):
        words = [sentence for step in range(2) for sentence in TEXTS[(index + 5 * step) % 12].split(". ")[:2]]
        talk = [{"from": ("human", "gpt")[i % 2], "value": f"{text} {index}"} for i, text in enumerate(words)]
        rows.append(json.dumps({"conversations": talk}))
    path.write_text("\n".join(rows))
    return path


def test_a_run_on_conversations_stores_and_learns_the_answers_alone(tiny_job, tmp_path, model, conversations, capsys):
    source = {"name": "talk", "uri": str(conversations), "style": "chat", "license": "CC0-1.0", "layout": "sharegpt"}
    source = {**source, "rights_basis": "owned", "answers": "last", "system": "Be brief."}
    job = tiny_job(
        tmp_path,
        corpus={"sources": [source], "context_tokens": 160},
        teacher={"model": str(model)},
    )
    assert main(["run", str(job)]) == 0, capsys.readouterr().err
    store = LocalStore(tmp_path / "out/targets")
    tokenizer = load_tokenizer(model)
    manifest = read_manifest(store)
    train, test = (
        [sequence for receipt in manifest.of_split(split) for (sequence, _), _ in read_rows(store, receipt)]
        for split in ("train", "test")
    )
    assert len(train) + len(test) == 30
    for sequence in (*train, *test):
        ((start, stop),) = sequence.label_spans
        begun, answer = (tokenizer.decode(ids.tolist()) for ids in np.split(sequence.token_ids, [start]))
        assert begun.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert begun.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert answer.endswith("<|im_end|>")
        assert stop == len(sequence.token_ids)
    report = json.loads((tmp_path / "out/report/metrics.json").read_text())
    assert report["holdout"]["labels"] == sum(sequence.num_labels for sequence in test)


def test_every_answer_of_a_conversation_is_stored_and_the_questions_between_are_context(
    tiny_job, tmp_path, model, conversations, capsys
):
    said = {"name": "talk", "uri": str(conversations), "style": "chat", "license": "CC0-1.0", "layout": "sharegpt"}
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tales = {"name": "tales", "uri": str(tmp_path / "tales.jsonl"), "style": "plain", "license": "CC0-1.0"}
    sources = [{**source, "rights_basis": "owned"} for source in (tales, said)]
    corpus = {"sources": sources, "context_tokens": 400, "holdout_fraction": 0.3}
    job = tiny_job(tmp_path, corpus=corpus, teacher={"model": str(model), "folds": 0})
    assert [main([stage, str(job)]) for stage in ("corpus", "teacher", "targets")] == [0, 0, 0], capsys.readouterr().err
    store, tokenizer = LocalStore(tmp_path / "out/targets"), load_tokenizer(model)
    manifest = read_manifest(store)
    assert manifest.schema_version == 2
    expected = []
    for line in conversations.read_text().splitlines():
        answers = [turn["value"] for turn in json.loads(line)["conversations"] if turn["from"] == "gpt"]
        expected.append([answer + "<|im_end|>" for answer in answers])
    found, plain = [], 0
    for part in manifest.parts:
        for row in pl.read_parquet(store.local_path(part.path)).iter_rows(named=True):
            pieces = np.split(row["token_ids"], np.cumsum(row["label_runs"])[:-1])
            if row["source"] == "talk":
                found.append([tokenizer.decode(ids.tolist()) for ids in pieces[1::2]])
            else:
                plain += 1
                assert len(pieces) == 2
    assert sorted(found) == sorted(expected)
    assert {len(answers) for answers in found} > {1}
    assert plain >= len(TEXTS)
    assert main(["verify", str(tmp_path / "out"), "--deep", "--quiet"]) == 0
