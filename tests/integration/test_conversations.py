"""A whole run on conversations: from rows of messages to an adapter and its report."""

import json
import shutil

import numpy as np
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
