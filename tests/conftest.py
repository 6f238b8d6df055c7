"""What many tests share: a tiny model with a tokenizer of its own, and a little real text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors here are tiny: a second thread costs more than it gives, the more so beside other work.
torch.set_num_threads(1)

TEXTS = [
    "The harbour lay grey at dawn. Two boats went out, and one came back before noon with nothing in it.",
    "She counted the coins twice; there were nine. Nine was not enough for the fare, so she walked.",
    "Rain again. The gutters could not hold it, and by four the lane was a stream that carried leaves.",
    "He never said why he sold the clock. My aunt thought it was the ticking; I think it was the silence after.",
    "A letter came on Tuesday. It was short, it was polite, and nobody in the house believed a word of it.",
    "The dog would not cross the bridge. We carried him over, and he looked at the water all the way.",
    "In the back of the shop stood eleven chairs, no two alike, and the old man sat on the floor.",
    "Bread at six, papers at seven, school at eight. It had been so for thirty years and then it was not.",
    "They argued about the map until it was too dark to read it, and after that they argued about the dark.",
    "Somebody had painted the gate green. It dried badly. All summer our sleeves came home with green on them.",
    "The teacher wrote one sum on the board, sat down, and waited. Nobody moved. A fly went round the lamp.",
    "When the band stopped we heard the sea. It had been there all along, keeping its own poor time.",
]


def save_tiny_model(folder: Path, *, seed: int = 0, vocab_size: int = 320, words: tuple[str, ...] = ()) -> Path:
    """A random Llama of two layers with a byte-level BPE tokenizer of 300 tokens; logits are padded to vocab_size."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator([*TEXTS, *words], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that changes the tiny model a little."""
    from softshard.config import LoraSettings
    from softshard.models import load_model
    from softshard.train.lora import attach_lora, save_adapter

    folder = tmp_path_factory.mktemp("teacher") / "fold-0"
    folder.mkdir()
    model = attach_lora(load_model(tiny_model, dtype=torch.float32, device="cpu"), LoraSettings(rank=4), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for name, content in save_adapter(model).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Twelve short texts by a person."""
    return TEXTS


def write_documents(path: Path, *, num_documents: int, words: str = "") -> Path:
    """JSON Lines of documents of six sentences each, all different."""
    sentences = [sentence for text in TEXTS for sentence in text.split(". ")]
    with path.open("w") as file:
        for index in range(num_documents):
            chosen = [sentences[(index * 7 + 5 * step * (1 + index % 3)) % len(sentences)] for step in range(6)]
            text = ". ".join(chosen) + f". {words}{index}."
            file.write(json.dumps({"text": text, "author": f"author {index % 3}"}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the job file of a whole run on the tiny model: `tiny_job(folder, train={"alpha": 0.2}, ...)`."""
    material = tmp_path_factory.mktemp("material")
    documents = write_documents(material / "tales.jsonl", num_documents=30)
    other = write_documents(material / "other.jsonl", num_documents=15, words="Valve ")

    def write(folder: Path, **changes: Any) -> Path:
        job: dict[str, Any] = {
            "name": "tiny",
            "out": str(folder / "out"),
            "corpus": {
                "sources": [_source("tales", documents)],
                "context_tokens": 48,
                "overlap_tokens": 8,
                "holdout_fraction": 0.2,
                "sequences_per_part": 24,
            },
            "teacher": {
                "model": str(tiny_model),
                "folds": 2,
                "optimizer": {"epochs": 1, "learning_rate": 1e-3, "batch_tokens": 512},
                "training_dtype": "float32",
            },
            "train": {
                "dtype": "float32",
                "num_threads": 1,
                "optimizer": {"epochs": 1, "learning_rate": 1e-3, "batch_tokens": 512, "checkpoint_steps": 2},
                "retention": {"sources": [_source("other", other)]},
                "baseline": {"learning_rates": [1e-3, 3e-3]},
            },
            "evaluate": {"num_samples": 4, "prompt_tokens": 8, "sample_tokens": 16},
        }
        for section, values in changes.items():
            job[section] = {**job.get(section, {}), **values} if isinstance(values, dict) else values
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(job, sort_keys=False))
        return path

    return write


def _source(name: str, path: Path) -> dict[str, str]:
    return {
        "name": name,
        "uri": str(path),
        "style": "literary",
        "license": "CC0-1.0",
        "rights_basis": "owned",
        "group_field": "author",
    }


@pytest.fixture(scope="session")
def finished(tiny_job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a whole run; not to be changed."""
    from softshard.jobfile import load_job
    from softshard.run.job import run_job
    from softshard.telemetry import SilentReporter

    folder = tmp_path_factory.mktemp("finished")
    run_job(load_job(tiny_job(folder)), SilentReporter())
    return folder / "out"


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a Dask scheduler with one worker, both in this process, which keeps what it has loaded."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        resources={"teacher": 1},
    ) as running:
        yield running.scheduler_address
