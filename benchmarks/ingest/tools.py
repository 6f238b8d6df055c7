"""One tool per run: `python -m benchmarks.ingest.tools NAME TEXT.jsonl MODEL FOLDER` tokenises the text and stores it.

Each tool is a process of its own, start-up included, and prints the number of tokens that it stored as its last line.
Special tokens are not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["TOOLS"]

_BATCH = 256
"""Documents per call of a tokenizer, as in softshard."""


def run_softshard(text: Path, model: Path, folder: Path) -> int:
    """The stage `corpus` of a job, by its command: screening, duplicates, hold-out and windows included."""
    from softshard.cli import main
    from softshard.corpus.manifest import read_corpus_manifest
    from softshard.storage import LocalStore

    source = {
        "name": "text",
        "uri": str(text),
        "style": "spoken",
        "license": "CC0-1.0",
        "rights_basis": "public-domain",
    }
    job = {
        "name": "ingest",
        "out": str(folder),
        "corpus": {"sources": [source], "context_tokens": 512, "overlap_tokens": 64},
        "teacher": {"model": str(model)},
        "cluster": {"workers": 1},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(job), encoding="utf-8")
    code = main(["corpus", str(file), "--quiet", "--json"])
    manifest = read_corpus_manifest(LocalStore(folder / "corpus"))
    if code or manifest is None:
        raise SystemExit(code or 1)
    # Every document ends with one special token.
    return sum(each.num_tokens - each.num_documents for each in manifest.statistics)


def run_datasets(text: Path, model: Path, folder: Path) -> int:
    """`datasets`: JSON Lines, `map` in batches, `save_to_disk`; the text itself is not kept."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"input_ids": encoded["input_ids"]}

    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(folder / "cache"))
    tokens = rows.map(tokenise, batched=True, batch_size=_BATCH, remove_columns=rows.column_names)
    tokens.save_to_disk(str(folder / "tokens"))
    return sum(len(ids) for ids in tokens.with_format("numpy")["input_ids"])


def run_datatrove(text: Path, model: Path, folder: Path) -> int:
    """datatrove: `JsonlReader`, `DocumentTokenizer` without shuffling, in one process."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(text.parent), glob_pattern=text.name),
            DocumentTokenizer(
                output_folder=str(folder / "tokens"),
                tokenizer_name_or_path=str(model / "tokenizer.json"),
                eos_token=None,
                batch_size=_BATCH,
                shuffle_documents=False,
                save_final_metadata=False,
            ),
        ],
        logging_dir=str(folder / "logs"),
    ).run()
    return sum(file.stat().st_size for file in (folder / "tokens").glob("*.ds")) // 2


def run_tokenizer(text: Path, model: Path, folder: Path) -> int:
    """The tokenizer alone: JSON Lines in, token counts out; nothing is stored."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    batch: list[str] = []
    num_tokens = 0

    def count() -> int:
        encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
        batch.clear()
        return sum(len(each.ids) for each in encoded)

    with text.open(encoding="utf-8") as lines:
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == _BATCH:
                num_tokens += count()
    return num_tokens + count()


def run_nothing(text: Path, model: Path, folder: Path) -> int:
    """softshard's command up to the first document: a corpus of one line."""
    first = folder.with_suffix(".first.jsonl")
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    first.write_text("".join(lines[:40]), encoding="utf-8")
    return run_softshard(first, model, folder)


TOOLS: Mapping[str, Callable[[Path, Path, Path], int]] = {
    "softshard": run_softshard,
    "datasets": run_datasets,
    "datatrove": run_datatrove,
    "tokenizer": run_tokenizer,
    "start": run_nothing,
}


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    print(TOOLS[name](*map(Path, paths)))
