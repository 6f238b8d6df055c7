"""The job file reference, `docs/job.md`: every key with its type, default and meaning, from the settings models."""

from __future__ import annotations

import json
from typing import Any

from softshard.config import Job

__all__ = ["job_reference"]

_INTRODUCTION = """# The job file

A job is one YAML file. Unknown keys, wrong types and impossible combinations are refused with their line and key, and
exit code 2. Paths are relative to the folder in which the command runs. `softshard schema job` prints the JSON Schema,
from which editors complete keys; this page is made from the same models by `make schema`.

The smallest job that runs:

```yaml
name: mine
out: runs/mine
corpus:
  sources:
    - {name: letters, uri: letters/, style: literary, license: CC0-1.0, rights_basis: public-domain}
teacher:
  model: models/SmolLM2-135M-Instruct
```

`jobs/demo.yaml` is a whole one with comments.
"""


def job_reference() -> str:
    """The reference as Markdown."""
    schema = Job.model_json_schema()
    lines = [_INTRODUCTION]
    queue: list[tuple[str, dict[str, Any]]] = [("", schema)]
    seen: set[str] = set()
    while queue:
        path, model = queue.pop(0)
        lines += _section(path, model)
        for name, field in model["properties"].items():
            here = f"{path}.{name}" if path else name
            for definition in _definitions(field):
                place = f"{here}[]" if _is_list(field) else here
                kind = schema["$defs"][definition]["properties"].get("kind", {}).get("const")
                variant = f"{place} ({kind})" if "oneOf" in field else place
                if variant not in seen:
                    seen.add(variant)
                    queue.append((variant, schema["$defs"][definition]))
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, model: dict[str, Any]) -> list[str]:
    title = f"## `{path}`" if path else "## The top"
    required = set(model.get("required", ()))
    rows = [title, "", *([model["description"], ""] if path and "description" in model else [])]
    rows += ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model["properties"].items():
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field)} | {_default(name, field, required)} | {meaning} |")
    return [*rows, ""]


def _definitions(field: dict[str, Any]) -> list[str]:
    """Names of the models that a field holds."""
    choices = [field, field.get("items", {}), *field.get("anyOf", ()), *field.get("oneOf", ())]
    return [choice["$ref"].rsplit("/", 1)[1] for choice in choices if "$ref" in choice]


def _is_list(field: dict[str, Any]) -> bool:
    return field.get("type") == "array"


def _type(field: dict[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if "$ref" in field or "oneOf" in field:
        return "section"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    limits = [
        f"{sign} {field[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in field
    ]
    return " ".join([str(field.get("type", "any")), *limits])


def _default(name: str, field: dict[str, Any], required: set[str]) -> str:
    if name in required:
        return "required"
    if any(True for _ in _definitions(field)) and not _is_list(field):
        return "none" if field.get("default") is None else "see below"
    return f"`{json.dumps(field.get('default'))}`"
