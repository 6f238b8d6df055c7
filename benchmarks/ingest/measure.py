"""What does it cost to turn text into a stored, tokenised corpus, beside other tools?

The text is the Python source of the installed packages, each file a line of JSON Lines, under the tokenizer of SmolLM2.
Each tool runs in a process of its own with one thread of tokenising. Its CPU seconds are those of the process and of
its children, start-up included. softshard runs its command `corpus`, which also normalises, finds duplicates, splits,
cuts windows and writes Parquet; `datasets` and datatrove only tokenise and store. datatrove runs with the Python that
DATATROVE names, where it is set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Options, Result, require, say, say_table
from softshard.corpus.screen import make_duplicate_key, normalise
from softshard.errors import JobInvalid

_ROOT = Path(__file__).parents[2]
_MODEL = "SmolLM2-135M-Instruct"
_MOST_BYTES_OF_A_FILE = 10**6
_FULL_BYTES, _QUICK_BYTES = 70 * 10**6, 4 * 10**6
_SPECIAL = re.compile(r"<\|\w+\|>|<\w+>")
_REPEATS = 2
_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """Of one run of one tool."""

    num_tokens: int
    cpu_seconds: float
    peak_mib: float


def measure(options: Options) -> Result:
    model = options.cache / _MODEL
    if not (options.cache / f"{_MODEL}.stamp").is_file():
        problem = f"is not there; make it with: python jobs/materials.py model --cache {options.cache}"
        raise JobInvalid(file=str(model), place="", problem=problem)
    pythons = {"softshard": sys.executable, "datasets": sys.executable, "tokenizer": sys.executable}
    if named := os.environ.get("DATATROVE"):
        pythons["datatrove"] = named
    with tempfile.TemporaryDirectory(prefix="softshard-ingest-") as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        num_documents, num_bytes = _write_text(text, _QUICK_BYTES if options.quick else _FULL_BYTES)
        say(f"{num_documents:,} documents, {num_bytes:,} bytes of text")
        runs: dict[str, list[_Cost]] = {tool: [] for tool in pythons}
        for repeat in range(1 if options.quick else _REPEATS):
            for tool, python in pythons.items():
                runs[tool].append(_run(tool, python, text, model.resolve(), folder / f"{tool}-{repeat}"))
        start = _run("start", sys.executable, text, model.resolve(), folder / "start")
    counted = {tool: {cost.num_tokens for cost in costs} for tool, costs in runs.items()}
    require(len(set.union(*counted.values())) == 1, f"all tools find the same number of tokens: {counted}")
    best = {tool: min(costs, key=lambda cost: cost.cpu_seconds) for tool, costs in runs.items()}
    return _result(best, start, num_bytes=num_bytes, num_documents=num_documents)


def _write_text(target: Path, most_bytes: int) -> tuple[int, int]:
    """Different source files in the order of their names, up to so many bytes; numbers of documents and of bytes.

    They are written as softshard would keep them, so that all tools count the same tokens.
    """
    seen: set[bytes] = set()
    num_bytes = 0
    packages = Path(sysconfig.get_paths()["purelib"])
    with target.open("w", encoding="utf-8") as file:
        for path in sorted(packages.rglob("*.py")):
            text = normalise(path.read_text(encoding="utf-8", errors="ignore"), form="NFC")
            key = make_duplicate_key(text, by="spacing")
            size = len(text.encode())
            if num_bytes >= most_bytes:
                break
            # What spells a special token is text for softshard, and one token for the others.
            plain = text.strip() and not _SPECIAL.search(text)
            if plain and size <= _MOST_BYTES_OF_A_FILE and key not in seen:
                seen.add(key)
                num_bytes += size
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return len(seen), num_bytes


def _run(tool: str, python: str, text: Path, model: Path, folder: Path) -> _Cost:
    folder.mkdir()
    command = [python, "-m", "benchmarks.ingest.tools", tool, str(text), str(model), str(folder / "out")]
    with (folder / "stdout").open("w+") as output:
        process = subprocess.Popen(command, cwd=_ROOT, env={**os.environ, **_ENVIRONMENT}, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        lines = output.read().splitlines()
    require(status == 0, f"{tool} ended without an error")
    return _Cost(
        num_tokens=int(lines[-1]), cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mib=usage.ru_maxrss / 1024
    )


def _result(best: Mapping[str, _Cost], start: _Cost, *, num_bytes: int, num_documents: int) -> Result:
    speed = {tool: num_bytes / 1e6 / cost.cpu_seconds for tool, cost in best.items()}
    rows = [
        (tool, f"{speed[tool]:.2f}", f"{cost.cpu_seconds:.1f}", f"{cost.peak_mib:,.0f}") for tool, cost in best.items()
    ]
    say_table(["", "MB per CPU second", "CPU seconds", "peak MiB"], rows)
    say(f"softshard on forty documents: {start.cpu_seconds:.1f} CPU seconds")
    figures = {"mb_per_cpu_s": round(speed["softshard"], 3), "peak_mib": round(best["softshard"].peak_mib)}
    figures |= {
        f"over_{name}": round(speed["softshard"] / speed[tool], 3)
        for tool, name in (("datasets", "datasets_map"), ("datatrove", "datatrove"), ("tokenizer", "tokenizer"))
        if tool in speed
    }
    figures["start_cpu_s"] = round(start.cpu_seconds, 2)
    details = {
        "bytes_of_text": num_bytes,
        "documents": num_documents,
        "cpu_seconds": {k: v.cpu_seconds for k, v in best.items()},
    }
    return Result(figures=figures, details=details)
