"""The columns and the metadata of a part, versions 1 and 2.

One row per sequence. Per-label values are single-level, non-nullable lists over the whole sequence. The metadata has
everything that decoding needs, so a part can be read without any other file. The versions differ in the column that
says which tokens are labels. Version 1 holds labels that run to the end of their sequence, version 2 any labels; parts
are written as version 2 only where version 1 cannot hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from softshard.config import SketchClass, sketch_class
from softshard.errors import PartCorrupt

__all__ = [
    "LABEL_COLUMNS",
    "METADATA_KEY",
    "PART_SCHEMAS",
    "RUNS_VERSION",
    "SCHEMA_VERSION",
    "Fidelity",
    "PartMetadata",
    "check_version",
    "read_metadata",
    "schema_text",
]

SCHEMA_VERSION = 1
"""Of parts in which the labels of every sequence run to its end, as in plain text."""
RUNS_VERSION = 2
"""Of parts in which context may follow labels, as in conversations."""
LABEL_COLUMNS = {SCHEMA_VERSION: "first_label", RUNS_VERSION: "label_runs"}
"""The column that says which tokens are labels, by version."""
METADATA_KEY = b"softshard"


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of, nullable=False))


def _schema(version: int) -> pa.Schema:
    is_list = version == RUNS_VERSION
    labels = pa.field(LABEL_COLUMNS[version], _list(pa.int32()) if is_list else pa.int32(), nullable=False)
    return pa.schema(
        [
            pa.field("sequence_id", pa.string(), nullable=False),
            pa.field("document_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("style", pa.string(), nullable=False),
            pa.field("group", pa.string(), nullable=False),
            pa.field("fold", pa.int16(), nullable=False),
            pa.field("start", pa.int32(), nullable=False),
            *(() if is_list else (labels,)),
            pa.field("mean_entropy", pa.float32(), nullable=False),
            pa.field("mean_label_logprob", pa.float32(), nullable=False),
            pa.field("token_ids", _list(pa.int32()), nullable=False),
            *((labels,) if is_list else ()),
            pa.field("label_logprob", _list(pa.float32()), nullable=False),
            pa.field("entropy", _list(pa.float32()), nullable=False),
            pa.field("tail_mass", _list(pa.float32()), nullable=False),
            pa.field("head_count", _list(pa.int32()), nullable=False),
            pa.field("tail_count", _list(pa.int32()), nullable=False),
            pa.field("head_ranks", _list(pa.int32()), nullable=False),
            pa.field("head_steps", _list(pa.int16()), nullable=False),
            pa.field("tail_gaps", _list(pa.int32()), nullable=False),
        ]
    )


PART_SCHEMAS = {version: _schema(version) for version in LABEL_COLUMNS}
"""By version: plain columns first, then lists."""


class Fidelity(BaseModel):
    """How close the stored sketches of a part are to the teacher's distributions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_squared_error: float
    """Mean over labels of the sum over tokens of (stored weight - probability) squared."""
    gradient_angle_degrees: float
    """Mean angle between (uniform - target) and (uniform - stored), the gradients of a student that knows nothing."""
    mean_kl_nats: float | None
    """Mean KL(target || stored), where the stored form covers every token (`full`); else null."""
    mean_entries: float
    """Mean entries per label, in one draw."""
    mass_by_rank: dict[str, float] | None
    """Mean mass of the 1, 8, 64 and 512 most likely tokens, over a random sample of the labels; null without one."""
    num_ranked: int
    """Labels of that sample."""


class PartMetadata(BaseModel):
    """Key-value metadata of a part, as JSON under the key `softshard`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: int
    part_id: str
    kind: str
    """Kind of sketch, one of `config.SKETCH_KINDS`."""
    tau: float | None
    """Weight of a tail entry; null for the kinds without a tail."""
    draws: int = Field(ge=1)
    """Independent tails of each label; 1 for the kinds without a tail."""
    k: int | None = None
    """Entries (`topk`)."""
    nucleus_mass: float | None = None
    """Mass asked for (`nucleus`)."""
    step: float = Field(gt=0)
    """Step of head_steps, in nats."""
    temperature: float
    """Temperature at capture."""
    seed: int
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1)
    teacher: dict[str, str | int | float | list[str]]
    """The teacher's identity: engine, versions, dtype, threads, digests of weights and adapters."""
    fidelity: Fidelity
    frequent_ids: tuple[int, ...] = ()
    """Ids of ranks 0, 1, 2, ...; all others follow, ascending."""

    @property
    def sketch_class(self) -> SketchClass:
        """The class of the kind, which states what the kind stores and what it leaves out."""
        return sketch_class(self.kind)

    @model_validator(mode="after")
    def _decodable(self) -> PartMetadata:
        ids = self.frequent_ids
        if len(set(ids)) != len(ids) or (ids and not 0 <= min(ids) <= max(ids) < self.vocab_size):
            raise ValueError("frequent_ids must be different tokens of the vocabulary")
        if (self.tau is not None) != sketch_class(self.kind).samples_tail:
            raise ValueError(f"kind {self.kind} with tau {self.tau}")
        return self


def read_metadata(schema: pa.Schema, *, uri: str) -> PartMetadata:
    """Read the metadata of a part from its Arrow schema.

    Raises:
        PartCorrupt: there is none, it has an unknown version, or the columns are not those of its version.
    """
    from pydantic import ValidationError

    raw = (schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise PartCorrupt(uri=uri, problem="is Parquet, but has no softshard metadata")
    try:
        values: dict[str, Any] = json.loads(raw)
        check_version(values.get("schema_version"), known=PART_SCHEMAS, uri=uri)
        metadata = PartMetadata.model_validate(values)
    except (ValueError, ValidationError) as error:
        raise PartCorrupt(uri=uri, problem=f"has unreadable metadata: {error}") from error
    if not schema.remove_metadata().equals(PART_SCHEMAS[metadata.schema_version]):
        problem = f"its columns are not those of schema version {metadata.schema_version}"
        raise PartCorrupt(uri=uri, problem=problem)
    return metadata


def check_version(version: Any, *, known: Iterable[int], uri: str) -> None:
    """Raise PartCorrupt for a version that is not known."""
    if version not in set(known) or isinstance(version, bool):
        names = " and ".join(map(str, known))
        raise PartCorrupt(uri=uri, problem=f"has schema version {version}, this softshard reads {names}")


def schema_text(version: int) -> str:
    """The Arrow schema of a version as text, one line per column."""
    return "\n".join(str(field) for field in PART_SCHEMAS[version]) + "\n"
