"""The published contracts as text: JSON Schema of job, manifest and report, and the Arrow schema of each
version of a part.

They are generated from the models that the code itself uses, committed under `schemas/`, and never read at run time.
Two pages of `docs/` are generated with them: the reference of the job file, from the same models, and that of the
commands, from their registry.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from softshard.cli.command_reference import command_reference
from softshard.cli.job_reference import job_reference
from softshard.config import Job
from softshard.evaluate.report import Report
from softshard.shard.manifest import Manifest
from softshard.shard.schema import RUNS_VERSION, SCHEMA_VERSION, schema_text

__all__ = ["check_schemas", "schema_texts", "write_schemas"]

_FILES = {
    "job": "job.schema.json",
    "manifest": "manifest.schema.json",
    "report": "report.schema.json",
    "part": "part.schema.txt",
    "part-v2": "part-v2.schema.txt",
    "reference": "../docs/job.md",
    "commands": "../docs/commands.md",
}


def schema_texts() -> dict[str, str]:
    """The text of each schema and page, by name."""
    models: dict[str, type[BaseModel]] = {"job": Job, "manifest": Manifest, "report": Report}
    texts = {name: _json_schema(model) for name, model in models.items()}
    parts = {"part": schema_text(SCHEMA_VERSION), "part-v2": schema_text(RUNS_VERSION)}
    return {**texts, **parts, "reference": job_reference(), "commands": command_reference()}


def _json_schema(model: type[BaseModel]) -> str:
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schemas(folder: str) -> list[str]:
    """Write every schema into a folder and the pages into the `docs/` beside it; returns the paths."""
    texts = _by_path(folder)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in texts]


def check_schemas(folder: str) -> list[str]:
    """Paths of the schemas and pages that are missing or differ from what the code would write."""
    expected = _by_path(folder)
    return [str(path) for path, text in expected.items() if not path.is_file() or path.read_text("utf-8") != text]


def _by_path(folder: str) -> dict[Path, str]:
    return {Path(os.path.normpath(Path(folder) / _FILES[name])): text for name, text in schema_texts().items()}
