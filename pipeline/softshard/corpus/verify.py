"""Whether a corpus folder is what its manifest says.

Every slice and every list of documents is read again, hashed, and compared with the manifest by its columns, rows and
labels; `deep` decodes the slices. A corpus without a manifest is one that is not complete, which is no finding.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from softshard.corpus.documents import DOCUMENTS_SCHEMA
from softshard.corpus.manifest import CorpusManifest, CorpusSlice, DocumentsFile, read_corpus_manifest
from softshard.corpus.slices import SLICE_SCHEMA, decode_slice
from softshard.errors import PartCorrupt
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.orphans import Orphan
from softshard.shard.verify import Finding
from softshard.storage import Store

__all__ = ["CorpusVerification", "find_corpus_orphans", "verify_corpus"]

_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusVerification:
    """What was looked at, and what is wrong."""

    manifest: CorpusManifest | None
    """None: there is none, or it is a finding."""
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
        lines.append((_MANIFEST, "says what it should, but in other bytes than it was written in"))
    for part in manifest.slices:
        lines += [(part.path, problem) for problem in _check_slice(store, part, deep=deep)]
    for file in manifest.documents:
        lines += [(file.path, problem) for problem in _check_documents(store, file)]
    findings = (Finding(path=path, problem=f"{store.uri}/{path}: {problem}") for path, problem in lines)
    return CorpusVerification(manifest=manifest, findings=tuple(findings))


def find_corpus_orphans(store: Store, manifest: CorpusManifest | None) -> tuple[Orphan, ...]:
    """Slices and lists of documents that the manifest does not name; of a corpus that is not complete, all."""
    named = set(manifest.paths) if manifest else set()
    found = [path for folder in ("sequences", "documents") for path in store.list(folder) if path not in named]
    return tuple(Orphan(path=path, num_bytes=store.size(path), kind="slice of no corpus") for path in found)


def _check_slice(store: Store, part: CorpusSlice, *, deep: bool) -> list[str]:
    try:
        content = _checked(store, part.path, part.sha256)
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        if not table.schema_arrow.remove_metadata().equals(SLICE_SCHEMA):
            return ["its columns are not those of a slice"]
        firsts = table.read(columns=["first_label"]).column(0).to_numpy()
        tokens = sum(_num_values(table, group, "token_ids.list.element") for group in range(table.num_row_groups))
        if deep:
            decode_slice(content, uri=f"{store.uri}/{part.path}")
    except PartCorrupt as error:
        return [str(error).removeprefix(f"{store.uri}/{part.path}: ")]
    except (pa.ArrowException, OSError) as error:
        return [f"is not readable as Parquet: {error}"]
    seen = (table.metadata.num_rows, tokens, tokens - int(firsts.sum()))
    said = (part.num_sequences, part.num_tokens, part.num_labels)
    return [f"has {seen} sequences, tokens and labels, the manifest says {said}"] if seen != said else []


def _num_values(table: pq.ParquetFile, group: int, column: str) -> int:
    names = [table.schema.column(index).path for index in range(len(table.schema))]
    return int(table.metadata.row_group(group).column(names.index(column)).num_values)


def _check_documents(store: Store, file: DocumentsFile) -> list[str]:
    try:
        content = _checked(store, file.path, file.sha256)
        table = pq.ParquetFile(pa.BufferReader(content))
    except PartCorrupt as error:
        return [str(error).removeprefix(f"{store.uri}/{file.path}: ")]
    except (pa.ArrowException, OSError) as error:
        return [f"is not readable as Parquet: {error}"]
    if not table.schema_arrow.remove_metadata().equals(DOCUMENTS_SCHEMA):
        return ["its columns are not those of a list of documents"]
    rows = table.metadata.num_rows
    return [f"has {rows} documents, the manifest says {file.num_documents}"] if rows != file.num_documents else []


def _checked(store: Store, path: str, sha256: str) -> bytes:
    """Content of a file that has the hash its manifest names. Raises PartCorrupt."""
    uri = f"{store.uri}/{path}"
    try:
        content = store.read(path)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="is missing") from error
    except OSError as error:
        raise PartCorrupt(uri=uri, problem=f"cannot be read: {error}") from error
    if (digest := sha256_hex(content)) != sha256:
        raise PartCorrupt(uri=uri, problem=f"has sha256 {digest[:16]}, the corpus manifest names {sha256[:16]}")
    return content
