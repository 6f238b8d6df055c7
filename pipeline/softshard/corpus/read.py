"""A corpus that was written: slices to sequences. A slice's hash is checked before its first sequence is given."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from softshard.corpus.manifest import CorpusManifest, CorpusSlice
from softshard.corpus.slices import decode_slice
from softshard.errors import PartCorrupt
from softshard.records.digest import sha256_hex
from softshard.sketch.types import TokenSequence
from softshard.storage import Store

__all__ = ["iter_sequences", "read_slice"]


def read_slice(store: Store, part: CorpusSlice) -> list[TokenSequence]:
    """Sequences of a slice, in their order. Raises PartCorrupt when it is missing or is not what the manifest names."""
    uri = f"{store.uri}/{part.path}"
    try:
        content = store.read(part.path)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=uri, problem="this slice of the corpus is missing") from error
    digest = sha256_hex(content)
    if digest != part.sha256:
        problem = f"has sha256 {digest[:16]}, the corpus manifest names {part.sha256[:16]}"
        raise PartCorrupt(uri=uri, problem=problem)
    return decode_slice(content, uri=uri)


def iter_sequences(
    store: Store, manifest: CorpusManifest, *, split: str | None, folds_excluded: Collection[int] = ()
) -> Iterator[TokenSequence]:
    """Sequences of a split, or of both for None, without those of some folds, in the manifest's order.

    One slice is held at a time. Raises PartCorrupt.
    """
    for part in manifest.slices:
        if split in {None, part.split} and part.fold not in folds_excluded:
            yield from read_slice(store, part)
