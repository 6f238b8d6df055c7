"""The record of a corpus: what it was made from, what was left out, its slices and its statistics.

`manifest.json` is written last; a corpus folder without it is not complete.
"""

from __future__ import annotations

import io
from typing import Literal

from pydantic import Field

from softshard.errors import PartCorrupt
from softshard.records.canonical import write_canonical_json
from softshard.records.json_stream import read_json_items
from softshard.records.record import Record, SpooledRecord
from softshard.records.spool import Spool
from softshard.shard.manifest import SourceRights
from softshard.shard.schema import RUNS_VERSION, SCHEMA_VERSION, check_version
from softshard.storage import Store

__all__ = [
    "CORPUS_VERSION",
    "CORPUS_VERSION_WITH_RUNS",
    "PART_VERSIONS",
    "CorpusManifest",
    "CorpusSlice",
    "CorpusStatistics",
    "DocumentsFile",
    "read_corpus_manifest",
    "write_corpus_manifest",
]

CORPUS_VERSION = 2
"""Of a corpus in which the labels of every sequence run to its end, as in plain text."""
CORPUS_VERSION_WITH_RUNS = 3
"""Of a corpus with a sequence whose labels do not."""
PART_VERSIONS = {CORPUS_VERSION: SCHEMA_VERSION, CORPUS_VERSION_WITH_RUNS: RUNS_VERSION}
"""The schema version of the parts that are made from a corpus, by its own version."""
_PATH = "manifest.json"


class CorpusSlice(Record):
    """One file of sequences, all of one split and one fold."""

    path: str = Field(pattern=r"^sequences/[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Path below the corpus folder, and nowhere else."""
    split: Literal["train", "test"]
    fold: int
    """Fold of its documents; -1: none."""
    sha256: str
    num_documents: int
    """Documents that start in this slice."""
    num_sequences: int
    num_labels: int
    num_tokens: int
    """Tokens of its sequences, with the tokens that windows share counted in each."""
    num_bytes_text: int
    """UTF-8 bytes of the documents that start in this slice."""


class DocumentsFile(Record):
    """One file with one row per document."""

    path: str = Field(pattern=r"^documents/[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Path below the corpus folder, and nowhere else."""
    sha256: str
    num_documents: int


class CorpusStatistics(Record):
    """Documents of one style, source and split."""

    style: str
    source: str
    split: Literal["train", "test"]
    num_documents: int
    num_tokens: int
    """Tokens of the documents, including BOS and EOS, each counted once."""
    num_sequences: int
    num_labels: int
    mean_tokens: float
    """Tokens per document."""
    median_tokens: float
    max_tokens: int


class CorpusManifest(SpooledRecord):
    """The record of a whole corpus.

    Its digest covers the content of the corpus: everything but `key` and `documents`, which also say where each text
    was read, so that touching a file or moving a folder does not change the digest.
    """

    left_out_of_digest = frozenset({"key", "documents"})

    schema_version: int
    """Of all slices."""
    key: str
    """Digest of everything that the corpus is made from: settings, tokenizer, folds, seed, version, input files."""
    tokenizer_fingerprint: str
    vocab_size: int
    context_tokens: int
    overlap_tokens: int
    folds: int
    seed: int
    sources: tuple[SourceRights, ...]
    counts: dict[str, int]
    """Documents by outcome of the screening: kept, empty, undecodable, oversize, malformed, duplicate, and, if any is,
    near_duplicate and dropped."""
    train_digests: tuple[str, ...]
    """By fold: SHA-256 of the ids of its train documents, 16 bytes each, in their order; empty without folds."""
    slices: Spool[CorpusSlice]
    """The train split by fold, then the test split; within a fold in the order in which the documents came."""
    documents: tuple[DocumentsFile, ...]
    statistics: tuple[CorpusStatistics, ...]

    @property
    def part_version(self) -> int:
        """The schema version of the parts that are made from the slices."""
        return PART_VERSIONS[self.schema_version]

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its files."""
        return (*(part.path for part in self.slices), *(file.path for file in self.documents))

    def of_split(self, split: str) -> tuple[CorpusSlice, ...]:
        """Slices of one split."""
        return tuple(part for part in self.slices if part.split == split)


def write_corpus_manifest(store: Store, manifest: CorpusManifest) -> None:
    """Write `manifest.json`, over an older one; the corpus is then complete."""
    content = io.BytesIO()
    write_canonical_json(content, manifest.members())
    store.replace(_PATH, content.getvalue())


def read_corpus_manifest(store: Store) -> CorpusManifest | None:
    """Read the manifest of a corpus folder; None when the corpus is not complete.

    Raises:
        PartCorrupt: it is not JSON, has another version, or lacks a key.
    """
    uri = f"{store.uri}/{_PATH}"
    try:
        slices = Spool(CorpusSlice)
        with store.open(_PATH) as file:
            values = read_json_items(file, name="slices", on_item=lambda item: slices.append(CorpusSlice(**item)))
        check_version(values["schema_version"], known=PART_VERSIONS, uri=uri)
        return CorpusManifest.model_validate({**values, "slices": slices})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartCorrupt(uri=uri, problem=f"is not the manifest of a corpus: {error}") from error
