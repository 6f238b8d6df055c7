"""Builds a corpus: reads the sources and writes slices of sequences, the list of documents and a manifest.

Documents are streamed: screened, tokenised in small batches, cut into windows and written in slices. Memory grows with
the corpus only by one set entry of 16 bytes per document and one counter per author. The same input gives the same
bytes, and a complete corpus from the same input is not made again.
"""

from __future__ import annotations

import itertools
from typing import Any

from softshard.config import CorpusSettings
from softshard.corpus.counts import CorpusCount, CorpusCounter
from softshard.corpus.documents import DocumentsWriter, corpus_statistics
from softshard.corpus.manifest import (
    CORPUS_VERSION,
    CorpusManifest,
    read_corpus_manifest,
    write_corpus_manifest,
)
from softshard.corpus.reading import Encode, find_template, tokenise_documents
from softshard.corpus.screen import Screen
from softshard.corpus.slices import SliceWriter
from softshard.corpus.tally import FilesNotRead
from softshard.errors import CorpusEmpty
from softshard.models import Tokenizer
from softshard.records.digest import canonical_digest
from softshard.shard.manifest import SourceRights
from softshard.sketch.types import TokenSequence
from softshard.sources.read import list_versions
from softshard.storage import Store
from softshard.telemetry import Reporter, SilentReporter

__all__ = ["build_corpus", "corpus_key", "count_corpus", "current_corpus", "first_sequences"]


_LATER_KEYS: dict[str, Any] = {
    "encoding": "utf-8",
    "drop_texts": [],
    "split_texts": "none",
    "configuration": None,
    "layout": "text",
    "roles": {},
    "answers": "assistant",
    "system": None,
}


def corpus_key(settings: CorpusSettings, *, tokenizer: Tokenizer, folds: int, seed: int) -> str:
    """Digest of everything that a corpus is made from; an input file is identified by its URI and version.

    Raises:
        SourceUnreadable: a source cannot be listed.
        SourceUnavailable: a source cannot be reached for now.
        ChatTemplateInvalid: there are conversations, and no chat template for them.
    """
    template = find_template(settings, tokenizer)
    files = [
        [source.name, [[ascii(uri), version] for uri, version in list_versions(source)]] for source in settings.sources
    ]
    # Consent changes what may be trained on, and the largest share left out what is refused, not what is read.
    excluded: dict[str, Any] = {"sources": {"__all__": {"consent"}}, "max_left_out": True, "chat_template": True}
    read = settings.model_dump(mode="json", exclude=excluded)
    read["sources"] = [_without_later_keys(source) for source in read["sources"]]
    made_from = [CORPUS_VERSION, read, tokenizer.fingerprint, tokenizer.vocab_size, folds, seed, files]
    return canonical_digest(made_from if template is None else [*made_from, template.text])


def _without_later_keys(source: dict[str, Any]) -> dict[str, Any]:
    """Settings of a source without the keys that came later, where they have their defaults: older corpora stay."""
    return {key: value for key, value in source.items() if key not in _LATER_KEYS or value != _LATER_KEYS[key]}


def current_corpus(
    *, settings: CorpusSettings, tokenizer: Tokenizer, folds: int, seed: int, store: Store
) -> CorpusManifest | None:
    """The existing corpus, if it is complete and was made from the same input; no text is read.

    Raises:
        SourceUnreadable: a source cannot be listed.
        PartCorrupt: the existing manifest cannot be read.
    """
    return _find_complete(store, corpus_key(settings, tokenizer=tokenizer, folds=folds, seed=seed))


def _find_complete(store: Store, key: str) -> CorpusManifest | None:
    existing = read_corpus_manifest(store)
    if existing is None or existing.key != key:
        return None
    found = {path for folder in ("sequences", "documents") for path in store.list(folder)}
    named = itertools.chain((part.path for part in existing.slices), (file.path for file in existing.documents))
    return existing if all(path in found for path in named) else None


def build_corpus(
    *,
    settings: CorpusSettings,
    tokenizer: Tokenizer,
    folds: int,
    seed: int,
    store: Store,
    reporter: Reporter,
    encode: Encode | None = None,
) -> CorpusManifest:
    """Write the corpus to `store`, or return the existing one if it was made from the same input.

    Args:
        folds: K; the train documents are divided into K folds, or none with 0.
        encode: tokenises the texts as `tokenizer` does; None: this process does it.

    Raises:
        SourceUnreadable: a source cannot be listed or read.
        TooMuchLeftOut: more of a source cannot be used than `max_left_out` allows.
        CorpusEmpty: nothing is left after screening, or a split is empty.
        FoldEmpty: a fold's style teacher would have no document.
        PartCorrupt: the existing manifest cannot be read.
        ChatTemplateInvalid: there are conversations, and no chat template for them.
        StorageFull: no space is left.
    """
    key = corpus_key(settings, tokenizer=tokenizer, folds=folds, seed=seed)
    existing = _find_complete(store, key)
    if existing is not None:
        return existing
    screen, counter = Screen(settings, folds=folds, seed=seed), CorpusCounter(settings)
    windows: dict[str, str | int] = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "context_tokens": settings.context_tokens,
        "overlap_tokens": settings.overlap_tokens,
    }
    slices = SliceWriter(store, sequences_per_slice=settings.sequences_per_part, metadata=windows)
    documents = DocumentsWriter(store)
    for found in tokenise_documents(settings, tokenizer, screen, reporter, encode=encode):
        count = counter.add(found.document, found.sequences())
        documents.add(found.document, num_tokens=found.num_tokens, count=count)
        slices.add(found.document, found.sequences())
    counter.finish(screen, folds=folds)
    files, written = documents.finish(), slices.finish()
    manifest = CorpusManifest(
        **windows,
        schema_version=slices.version,
        key=key,
        folds=folds,
        seed=seed,
        sources=_list_rights(settings),
        counts=screen.counts,
        train_digests=documents.train_digests(folds=folds),
        slices=written,
        documents=files,
        statistics=corpus_statistics(store, files),
    )
    write_corpus_manifest(store, manifest)
    return manifest


def count_corpus(
    *, settings: CorpusSettings, tokenizer: Tokenizer, folds: int, seed: int, reporter: Reporter
) -> CorpusCount:
    """Count what `build_corpus` would write, with the same code and without writing. Raises what it raises."""
    screen, counter = Screen(settings, folds=folds, seed=seed), CorpusCounter(settings)
    not_read: list[FilesNotRead] = []
    for found in tokenise_documents(settings, tokenizer, screen, reporter, not_read=not_read):
        counter.add(found.document, found.sequences())
    return counter.finish(screen, folds=folds).model_copy(update={"not_read": tuple(not_read)})


def first_sequences(
    *, settings: CorpusSettings, tokenizer: Tokenizer, seed: int, num_tokens: int
) -> list[TokenSequence]:
    """The first sequences of the corpus, with at least `num_tokens` tokens together if the corpus has so many.

    Raises:
        SourceUnreadable: a source cannot be listed or read.
        CorpusEmpty: nothing is left after screening.
    """
    screen = Screen(settings, folds=0, seed=seed)
    sequences: list[TokenSequence] = []
    given = 0
    for found in tokenise_documents(settings, tokenizer, screen, SilentReporter()):
        for sequence in found.sequences():
            sequences.append(sequence)
            given += len(sequence.token_ids)
            if given >= num_tokens:
                return sequences
    if not sequences:
        raise CorpusEmpty(counts=screen.counts)
    return sequences


def _list_rights(settings: CorpusSettings) -> tuple[SourceRights, ...]:
    return tuple(
        SourceRights(name=source.name, style=source.style, license=source.license, rights_basis=source.rights_basis)
        for source in settings.sources
    )
