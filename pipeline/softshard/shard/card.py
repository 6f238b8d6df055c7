"""The data set card: README.md of a `targets/` folder, with the splits for `datasets` and a description for people."""

from __future__ import annotations

import json

from softshard.shard.manifest import Manifest
from softshard.storage import Store

__all__ = ["write_card"]


def write_card(store: Store, manifest: Manifest) -> None:
    """Write README.md. It lists every part where `data/` holds files that the manifest does not name, else folders."""
    paths: dict[str, list[str]] = {"train": [], "test": []}
    for part in manifest.parts:
        paths[part.split].append(part.path)
    named = {path for listed in paths.values() for path in listed}
    if named.issuperset(store.list("data")):
        paths = {split: [f"data/{split}/*.parquet"] if listed else [] for split, listed in paths.items()}
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, listed in paths.items():
        if listed:
            lines += [f"  - split: {split}", "    path:", *(f"    - {path}" for path in listed)]
    totals = manifest.totals
    licenses = sorted({source.license for source in manifest.sources})
    lines += [
        "tags:",
        "- soft-labels",
        "- knowledge-distillation",
        "---",
        "",
        f"# Targets of {manifest.job}",
        "",
    ]
    lines += [
        "One row a sequence; every label of it has a sparse record of the teacher's whole next-token distribution.",
        f"Manifest `{manifest.digest[:16]}`: {totals.num_parts} parts,"
        f" {totals.num_sequences:,} sequences, {totals.num_labels:,} labels. Licences: {', '.join(licenses)}.",
        "",
        "| source | style | licence | rights |",
        "|---|---|---|---|",
        *(f"| {s.name} | {s.style} | {s.license} | {s.rights_basis} |" for s in manifest.sources),
        "",
        f"Sketch: {', '.join(f'{name} {value}' for name, value in manifest.target.items())}.",
        *_fidelity(manifest),
        f"Tokenizer `{manifest.tokenizer_fingerprint[:16]}`, {manifest.vocab_size:,} tokens.",
        "",
        "```python",
        "import polars as pl",
        f"rows = pl.read_parquet({json.dumps(paths['train'])})",
        "```",
        "",
        "`docs/format.md` of softshard has the ten lines that turn a row into probabilities.",
    ]
    content = ("\n".join(lines) + "\n").encode()
    if not store.exists("README.md") or store.read("README.md") != content:
        store.replace("README.md", content)


def _fidelity(manifest: Manifest) -> list[str]:
    if manifest.fidelity is None or manifest.bytes_per_position is None:
        return []
    fidelity = manifest.fidelity
    return [
        f"{manifest.bytes_per_position:.1f} bytes and {fidelity.mean_entries:.1f} entries per position; against the"
        f" teacher's whole distribution: mean squared error {fidelity.mean_squared_error:.4g}, gradient angle"
        f" {fidelity.gradient_angle_degrees:.1f} degrees."
    ]
