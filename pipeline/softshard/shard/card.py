"""The data set card: README.md of a `targets/` folder, with the splits for `datasets` and a description for people."""

from __future__ import annotations

import json
from typing import Any

import yaml

from softshard.shard.manifest import Manifest, SourceRights
from softshard.storage import Store

__all__ = ["licence_header", "write_card"]


def write_card(store: Store, manifest: Manifest) -> None:
    """Write README.md. It lists every part where `data/` holds files that the manifest does not name, else folders."""
    paths: dict[str, list[str]] = {"train": [], "test": []}
    for part in manifest.parts:
        paths[part.split].append(part.path)
    named = {path for listed in paths.values() for path in listed}
    if named.issuperset(store.list("data")):
        paths = {split: [f"data/{split}/*.parquet"] if listed else [] for split, listed in paths.items()}
    totals = manifest.totals
    header = {
        "configs": [{"config_name": "default", "data_files": _data_files(paths)}],
        "pretty_name": f"Targets of {manifest.job}",
        "size_categories": [_size_category(totals.num_sequences)],
        "tags": ["knowledge-distillation", "soft-labels"],
        "task_categories": ["text-generation"],
        **licence_header(manifest.sources),
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# Targets of {manifest.job}", ""]
    licenses = sorted({source.license for source in manifest.sources})
    lines += [
        "One row per sequence; every label of it has a sparse record of the teacher's whole next-token distribution.",
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


def licence_header(sources: tuple[SourceRights, ...]) -> dict[str, str]:
    """The licence in the hub's keys. It allows one identifier, so several licences become `other`."""
    licences = sorted({source.license for source in sources})
    if len(licences) == 1 and not licences[0].startswith("LicenseRef-") and " " not in licences[0]:
        return {"license": licences[0].lower()}
    return {"license": "other", "license_name": ", ".join(licences)}


def _data_files(paths: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [{"split": split, "path": listed} for split, listed in paths.items() if listed]


def _size_category(num_rows: int) -> str:
    """The hub's category of a number of rows, such as `1K<n<10K`."""
    lower, name = "", "1K"
    for limit, name in ((10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")):
        if num_rows < limit:
            return f"{lower}<n<{name}" if lower else f"n<{name}"
        lower = name
    return f"n>{name}"


def _fidelity(manifest: Manifest) -> list[str]:
    if manifest.fidelity is None or manifest.bytes_per_position is None:
        return []
    fidelity = manifest.fidelity
    return [
        f"{manifest.bytes_per_position:.1f} bytes and {fidelity.mean_entries:.1f} entries per position; against the"
        f" teacher's whole distribution: mean squared error {fidelity.mean_squared_error:.4g}, gradient angle"
        f" {fidelity.gradient_angle_degrees:.1f} degrees."
    ]
