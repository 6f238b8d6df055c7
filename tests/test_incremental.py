"""A corpus that has grown since the last run: new documents cost their own parts, and what was there stays as it is."""

import json

from softshard.jobfile import load_job
from softshard.run.job import run_job
from softshard.shard.manifest import read_manifest
from softshard.telemetry import SilentReporter

STAGES = ("corpus", "teacher", "targets")
SEQUENCES_PER_PART = 8


def documents(texts, numbers):
    return [{"text": f"{texts[n % len(texts)]} {texts[(5 * n + 3) % len(texts)]} No. {n}."} for n in numbers]


def files_of(targets):
    """When each part and receipt was written."""
    found = [path for folder in ("data", "receipts") for path in (targets / folder).rglob("*") if path.is_file()]
    return {path.relative_to(targets).as_posix(): path.stat().st_mtime_ns for path in found}


def test_new_documents_at_the_end_cost_their_own_parts_and_no_new_ones_cost_nothing(tiny_job, tmp_path, texts):
    corpus, targets = tmp_path / "corpus", tmp_path / "out/targets"
    corpus.mkdir()
    source = {"name": "letters", "uri": str(corpus), "style": "literary", "license": "CC0-1.0", "rights_basis": "owned"}
    sources = {"sources": [source], "sequences_per_part": SEQUENCES_PER_PART}
    path = tiny_job(tmp_path, corpus=sources, teacher={"folds": 0}, train={"retention": None})

    def run_with(name, numbers):
        lines = [json.dumps(document) + "\n" for document in documents(texts, numbers)]
        (corpus / name).write_text("".join(lines))
        run_job(load_job(path), SilentReporter(), stages=STAGES)
        return list(read_manifest(targets).parts), files_of(targets)

    parts, files = run_with("2026-11-01.jsonl", range(30))
    assert run_with("2026-11-01.jsonl", range(30)) == (parts, files), "a file that was written again, as it was"

    new_parts, new_files = run_with("2026-11-02.jsonl", range(30, 36))
    ids = {part.part_id for part in parts}
    computed = [part for part in new_parts if part.part_id not in ids]
    num_new = sum(part.num_sequences for part in new_parts) - sum(part.num_sequences for part in parts)
    num_splits = len({part.split for part in new_parts})
    assert num_new > 0
    assert sum(part.num_sequences for part in computed) <= num_new + num_splits * (SEQUENCES_PER_PART - 1)
    assert len(new_parts) - len(computed) >= len(parts) - num_splits
    assert {name: new_files[name] for name in files} == files, "nothing that was there was written again"
    assert len(new_files) - len(files) == 2 * len(computed), "a part and its receipt for each"
