"""Tokenising the corpus's texts on a cluster: batches of texts in, their ids out, in the order of the batches.

Reading, screening and cutting stay with the client, which has to see the documents in order. Tokenising is most of the
work on a corpus, and the ids of a text depend on nothing else, so the place where they are made changes no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softshard.cluster.cluster import Cluster
from softshard.config import ClusterSettings, CorpusSettings
from softshard.corpus.reading import Encode
from softshard.corpus.tokenize import encode_texts
from softshard.errors import TokenizerMismatch
from softshard.models import Tokenizer, load_tokenizer
from softshard.sources.read import list_source

__all__ = ["encode_on", "is_worth_a_cluster"]

_LEAST_BYTES = 64 * 2**20
"""One process reads and tokenises this much in about the time that a local cluster takes to start."""


def is_worth_a_cluster(settings: CorpusSettings, cluster: ClusterSettings) -> bool:
    """Whether there are several workers and enough text for them; a file of unknown size counts as empty.

    Raises:
        SourceUnreadable: a source cannot be listed.
    """
    if cluster.is_local and cluster.most_workers == 1:
        return False
    return sum(file.size or 0 for source in settings.sources for file in list_source(source)) >= _LEAST_BYTES


def encode_on(cluster: Callable[[], Cluster], *, model: Path, fingerprint: str, out: str) -> Encode:
    """A function that `build_corpus` calls to tokenise.

    Args:
        cluster: opens the cluster; called at the first text.
        model: folder with the tokenizer, also on the workers.
        fingerprint: of the tokenizer; a worker that finds another one there raises an error.
        out: the corpus folder, for errors.
    """

    def encode(batches: Iterable[list[str]]) -> Iterator[list[NDArray[np.int32]]]:
        encode_batch = partial(_encode, folder=model, fingerprint=fingerprint)
        return cluster().map_in_order(encode_batch, batches, name="corpus", out=out)

    return encode


def _encode(texts: list[str], *, folder: Path, fingerprint: str) -> list[NDArray[np.int32]]:
    return encode_texts(texts, tokenizer=_tokenizer(folder, fingerprint))


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        # A worker caches a tokenizer, and the folder may have changed since.
        load_tokenizer.cache_clear()
        tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise TokenizerMismatch(
            data="the corpus",
            data_fingerprint=fingerprint,
            model=str(folder),
            model_fingerprint=tokenizer.fingerprint,
        )
    return tokenizer
