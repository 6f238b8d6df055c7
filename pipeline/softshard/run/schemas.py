"""The published contracts as text: JSON Schema of job, manifest and report, and the Arrow schema of a part.

They are generated from the models that the code itself uses, committed under `schemas/`, and never read at run time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from softshard.config import Job
from softshard.evaluate.report import Report
from softshard.shard.manifest import Manifest
from softshard.shard.schema import schema_text

__all__ = ["check_schemas", "schema_texts", "write_schemas"]

_FILES = {
    "job": "job.schema.json",
    "manifest": "manifest.schema.json",
    "report": "report.schema.json",
    "part": "part.schema.txt",
}


def schema_texts() -> dict[str, str]:
    """Text of each schema by its name."""
    models: dict[str, type[BaseModel]] = {"job": Job, "manifest": Manifest, "report": Report}
    texts = {name: _json_schema(model) for name, model in models.items()}
    return {**texts, "part": schema_text()}


def _json_schema(model: type[BaseModel]) -> str:
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schemas(folder: str) -> list[str]:
    """Write every schema into a folder; the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in schema_texts().items():
        path = Path(folder) / _FILES[name]
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def check_schemas(folder: str) -> list[str]:
    """Paths of the schemas in a folder that are missing or not what the code would write."""
    expected = {Path(folder) / _FILES[name]: text for name, text in schema_texts().items()}
    return [str(path) for path, text in expected.items() if not path.is_file() or path.read_text("utf-8") != text]
