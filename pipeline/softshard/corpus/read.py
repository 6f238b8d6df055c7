"""Reads a corpus that was written. The hash of each file is compared with the corpus manifest before it is used."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from softshard.corpus.manifest import CorpusManifest, CorpusSlice, DocumentsFile
from softshard.corpus.slices import decode_slice
from softshard.shard.files import read_checked
from softshard.sketch.types import TokenSequence
from softshard.storage import Store

__all__ = ["iter_sequences", "read_listed", "read_slice"]


def read_slice(store: Store, part: CorpusSlice) -> list[TokenSequence]:
    """Sequences of a slice, in their order. Raises PartCorrupt when it is missing or is not what the manifest names."""
    return decode_slice(read_listed(store, part), uri=f"{store.uri}/{part.path}")


def read_listed(store: Store, file: CorpusSlice | DocumentsFile) -> bytes:
    """Bytes of a file of the corpus. Raises PartCorrupt when it is missing or its hash is not the manifest's."""
    return read_checked(store, file.path, sha256=file.sha256, named_by="the corpus manifest")


def iter_sequences(
    store: Store, manifest: CorpusManifest, *, split: str | None, folds_excluded: Collection[int] = ()
) -> Iterator[TokenSequence]:
    """Sequences of a split, or of both for None, without those of some folds, in the order of the manifest.

    One slice is in memory at a time. Raises PartCorrupt.
    """
    for part in manifest.slices:
        if split in {None, part.split} and part.fold not in folds_excluded:
            yield from read_slice(store, part)
