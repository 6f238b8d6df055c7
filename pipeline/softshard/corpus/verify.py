"""Compares a corpus folder with its manifest.

Every slice and every list of documents is read and hashed, and its columns, rows and labels are compared with the
manifest; `deep` decodes the slices too. A corpus without a manifest is not complete, which is not a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.corpus.documents import DOCUMENTS_SCHEMA
from softshard.corpus.manifest import PART_VERSIONS, CorpusManifest, CorpusSlice, DocumentsFile, read_corpus_manifest
from softshard.corpus.read import read_listed
from softshard.corpus.slices import SLICE_SCHEMAS, decode_slice
from softshard.errors import PartCorrupt
from softshard.records.canonical import canonical_json
from softshard.shard.files import parquet_errors
from softshard.shard.labels import count_labels
from softshard.shard.orphans import Orphan
from softshard.shard.schema import LABEL_COLUMNS
from softshard.shard.verify import Finding
from softshard.storage import Store

__all__ = ["CorpusVerification", "find_corpus_orphans", "verify_corpus"]

_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusVerification:
    """The manifest that was checked, and what is wrong."""

    manifest: CorpusManifest | None
    """None when there is none or when it cannot be read, which is a finding."""
    findings: tuple[Finding, ...]


def verify_corpus(store: Store, *, deep: bool = False) -> CorpusVerification:
    """Verify a `corpus/` or `retention/` folder."""
    try:
        manifest = read_corpus_manifest(store)
    except (PartCorrupt, OSError) as error:
        problem = f"{store.uri}/{_MANIFEST}: cannot be read: {error}" if isinstance(error, OSError) else str(error)
        return CorpusVerification(manifest=None, findings=(Finding(path=_MANIFEST, problem=problem),))
    if manifest is None:
        return CorpusVerification(manifest=None, findings=())
    lines: list[tuple[str, str]] = []
    if store.read(_MANIFEST) != canonical_json(manifest):
        lines.append((_MANIFEST, "has the right content, but not the bytes that were written"))
    for part in manifest.slices:
        problem_in = partial(_problem_in_slice, part=part, version=manifest.schema_version, deep=deep)
        lines += [(part.path, problem) for problem in _check_file(store, part, problem_in)]
    for file in manifest.documents:
        problem_in = partial(_problem_in_documents, file=file)
        lines += [(file.path, problem) for problem in _check_file(store, file, problem_in)]
    findings = (Finding(path=path, problem=f"{store.uri}/{path}: {problem}") for path, problem in lines)
    return CorpusVerification(manifest=manifest, findings=tuple(findings))


def find_corpus_orphans(store: Store, manifest: CorpusManifest | None) -> tuple[Orphan, ...]:
    """Slices and lists of documents that the manifest does not name; all of them when the corpus is not complete."""
    named = set(manifest.paths) if manifest else set()
    found = [path for folder in ("sequences", "documents") for path in store.list(folder) if path not in named]
    return tuple(Orphan(path=path, num_bytes=store.size(path), kind="slice of no corpus") for path in found)


def _check_file(
    store: Store, file: CorpusSlice | DocumentsFile, problem_in: Callable[[bytes, str], str | None]
) -> list[str]:
    """Problems of one file, of which `problem_in` looks for some in its content; it takes the content and the URI."""
    uri = f"{store.uri}/{file.path}"
    try:
        content = read_listed(store, file)
        with parquet_errors(uri):
            problem = problem_in(content, uri)
    except PartCorrupt as error:
        return [str(error).removeprefix(f"{uri}: ")]
    except OSError as error:
        return [f"cannot be read: {error}"]
    return [] if problem is None else [problem]


def _problem_in_slice(content: bytes, uri: str, *, part: CorpusSlice, version: int, deep: bool) -> str | None:
    table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    if not table.schema_arrow.remove_metadata().equals(SLICE_SCHEMAS[version]):
        return "its columns are not those of a slice"
    num_tokens = sum(_num_values(table, group, "token_ids.list.element") for group in range(table.num_row_groups))
    if deep:
        decode_slice(content, uri=uri)
    labels = table.read(columns=[LABEL_COLUMNS[PART_VERSIONS[version]]])
    found = (table.metadata.num_rows, num_tokens, count_labels(labels, num_tokens=num_tokens))
    named = (part.num_sequences, part.num_tokens, part.num_labels)
    return None if found == named else f"has {found} sequences, tokens and labels, the manifest says {named}"


def _num_values(table: pq.ParquetFile, group: int, column: str) -> int:
    names = [table.schema.column(index).path for index in range(len(table.schema))]
    return int(table.metadata.row_group(group).column(names.index(column)).num_values)


def _problem_in_documents(content: bytes, uri: str, *, file: DocumentsFile) -> str | None:
    table = pq.ParquetFile(pa.BufferReader(content))
    if not table.schema_arrow.remove_metadata().equals(DOCUMENTS_SCHEMA):
        return "its columns are not those of a list of documents"
    rows = table.metadata.num_rows
    return None if rows == file.num_documents else f"has {rows} documents, the manifest says {file.num_documents}"
