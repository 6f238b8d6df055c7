"""What many tests share: a tiny model with a tokenizer of its own, and a little real text."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fakes.tiny import TEXTS, save_tiny_model, write_documents

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tensors here are tiny: a second thread costs more than it gives, the more so beside other work.
torch.set_num_threads(1)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each module, take what is left in memory, mostly libraries, out of the garbage collector's sight.

    Each model that is let go costs a whole collection: .25 s with a million objects of libraries, .02 s without.
    """
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def pytest_collection_finish() -> None:
    """The same, for what the test modules have imported."""
    _freeze()


def pytest_unconfigure() -> None:
    """Give it back at the end: libraries that count their objects would report them as leaked."""
    gc.unfreeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that changes the tiny model a little."""
    from softshard.config import LoraSettings
    from softshard.finetune.adapters.lora import attach_lora, save_adapter
    from softshard.models import load_model

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


@pytest.fixture(scope="session")
def tiny_job(tiny_model: Path, scheduler: str | None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the job file of a whole run on the tiny model: `tiny_job(folder, train={"alpha": 0.2}, ...)`.

    Its cluster is the one of this process. With `cluster={}` in place of that a run starts a local cluster of its own.
    """
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
            "cluster": {"scheduler": scheduler},
        }
        if "cluster" in changes:
            job["cluster"] = changes.pop("cluster")
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
    from softshard.config.job_file import load_job
    from softshard.stages.job import run_job
    from softshard.telemetry import SilentReporter

    folder = tmp_path_factory.mktemp("finished")
    run_job(load_job(tiny_job(folder)), SilentReporter())
    return folder / "out"


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of a Dask scheduler with one worker, both in this process, which keeps what it has loaded.

    A local cluster of a run's own takes seconds to start, because each of its processes imports torch.
    """
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        resources={"teacher": 1},
        memory_limit=0,
    ) as running:
        yield running.scheduler_address
