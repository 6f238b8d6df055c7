"""Tests that need vLLM itself: `make test-vllm` runs them, in an environment of their own.

A run of all tests passes this folder by (`norecursedirs`), and nothing in it is collected where vLLM is not installed.
"""

from __future__ import annotations

import gc
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = ["test_*.py"] if find_spec("vllm") is None else []

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A sketch and a two-layer model gain nothing by it, and it would take minutes.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


@pytest.fixture(autouse=True, scope="module")
def _memory_of_engines_is_given_back():
    yield
    gc.collect()


@pytest.fixture(scope="session")
def scheduler() -> None:
    """None to share: vLLM forks, which threads in the process forbid; its engines run in a run's own cluster."""


@pytest.fixture(scope="session")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of all tests with heads of 32: vLLM's attention on a CPU knows no smaller ones."""
    from fakes.tiny_decoders import save_decoder

    folder = save_decoder(tmp_path_factory.mktemp("tiny") / "model", "Qwen2")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder
