"""Reads the documents of a corpus: screened, tokenised, cut into sequences, one after another.

Texts are tokenised in batches of bounded size, which may be done elsewhere; conversations are rendered here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from softshard.config import CorpusSettings, SourceSettings
from softshard.corpus.conversations import conversation_sequences
from softshard.corpus.render import ChatTemplate, load_chat_template
from softshard.corpus.screen import Screen, ScreenedDocument
from softshard.corpus.tally import FilesNotRead, SourceTally
from softshard.corpus.tokenize import encode_texts
from softshard.corpus.windows import document_windows, num_document_tokens
from softshard.errors import ConversationRefused
from softshard.models import Tokenizer
from softshard.sketch.types import TokenSequence
from softshard.sources.read import read_documents
from softshard.telemetry import Reporter

__all__ = ["Encode", "TokenisedDocument", "find_template", "tokenise_documents"]

_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 256

Encode = Callable[[Iterable[list[str]]], Iterator[list[NDArray[np.int32]]]]
"""Tokenises batches of texts, in their order; it may take a bounded number of batches in advance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedDocument:
    """A kept document in tokens."""

    document: ScreenedDocument
    num_tokens: int
    sequences: Callable[[], Iterable[TokenSequence]]
    """Makes its sequences; of a long text they are not all in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    """A kept document: a text that is not tokenised yet, or a conversation that is."""

    document: ScreenedDocument
    rendered: list[TokenSequence] | None = None


def find_template(settings: CorpusSettings, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the conversations; None where all sources are texts."""
    if all(source.layout == "text" for source in settings.sources):
        return None
    return load_chat_template(tokenizer, chosen=settings.chat_template)


def tokenise_documents(
    settings: CorpusSettings,
    tokenizer: Tokenizer,
    screen: Screen,
    reporter: Reporter,
    *,
    encode: Encode | None = None,
    not_read: list[FilesNotRead] | None = None,
) -> Iterator[TokenisedDocument]:
    """Yield the kept documents in tokens, in the order of the sources; then report what was left out.

    Files that are not read are reported, and added to `not_read`.
    """
    ahead: deque[list[_Admitted]] = deque()
    reading = _Reading(settings=settings, template=find_template(settings, tokenizer), screen=screen, reporter=reporter)

    def texts() -> Iterator[list[str]]:
        for batch in reading.batches([] if not_read is None else not_read):
            ahead.append(batch)
            yield [admitted.document.text for admitted in batch if admitted.rendered is None]

    with reporter.progress("corpus", total=None, unit="documents") as progress:
        for encoded in (encode or _encoder(tokenizer))(texts()):
            ids = iter(encoded)
            for admitted in ahead.popleft():
                document = admitted.document
                if admitted.rendered is not None:
                    yield _tokenised_conversation(document, admitted.rendered)
                elif len(token_ids := next(ids)):
                    yield _tokenised_text(document, token_ids, tokenizer, settings)
                else:
                    screen.withdraw(document)
            progress(screen.num_seen, note=f"{screen.counts['kept']:,} kept")
    reporter.say(screen.summary())


def _tokenised_text(
    document: ScreenedDocument, token_ids: NDArray[np.int32], tokenizer: Tokenizer, settings: CorpusSettings
) -> TokenisedDocument:
    windows = partial(
        document_windows,
        document,
        token_ids=token_ids,
        tokenizer=tokenizer,
        context_tokens=settings.context_tokens,
        overlap_tokens=settings.overlap_tokens,
    )
    num_tokens = num_document_tokens(token_ids, tokenizer=tokenizer)
    return TokenisedDocument(document=document, num_tokens=num_tokens, sequences=windows)


def _tokenised_conversation(document: ScreenedDocument, rendered: list[TokenSequence]) -> TokenisedDocument:
    num_tokens = sum(len(sequence.token_ids) for sequence in rendered)
    return TokenisedDocument(document=document, num_tokens=num_tokens, sequences=lambda: rendered)


def _encoder(tokenizer: Tokenizer) -> Encode:
    return lambda batches: (encode_texts(texts, tokenizer=tokenizer) for texts in batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """Reads and screens the documents of all sources, and renders the conversations."""

    settings: CorpusSettings
    template: ChatTemplate | None
    screen: Screen
    reporter: Reporter

    def batches(self, not_read: list[FilesNotRead]) -> Iterator[list[_Admitted]]:
        """Yield the kept documents in batches of bounded size; a larger document is a batch of its own."""
        batch: list[_Admitted] = []
        num_bytes = 0
        for source in self.settings.sources:
            tally = SourceTally(source)
            for document in self._documents(source, tally):
                batch.append(document)
                num_bytes += document.document.num_bytes
                if num_bytes >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
                    yield batch
                    batch, num_bytes = [], 0
            tally.finish(self.reporter, max_left_out=self.settings.max_left_out)
            not_read += tally.files_not_read()
        if batch:
            yield batch

    def _documents(self, source: SourceSettings, tally: SourceTally) -> Iterator[_Admitted]:
        limit = self.settings.max_document_bytes
        for raw in read_documents(source, max_document_bytes=limit, not_read=tally.not_read):
            tally.add(raw)
            document = self.screen.admit(raw, source=source)
            if document is None:
                continue
            if not document.views:
                yield _Admitted(document=document)
            elif rendered := self._render(document, tally):
                yield _Admitted(document=document, rendered=rendered)

    def _render(self, document: ScreenedDocument, tally: SourceTally) -> list[TokenSequence]:
        """The sequences of a conversation; none where it is left out, and counted so."""
        assert self.template is not None
        try:
            sequences, num_too_long = conversation_sequences(
                document,
                template=self.template,
                context_tokens=self.settings.context_tokens,
                overlap_tokens=self.settings.overlap_tokens,
            )
        except ConversationRefused as error:
            self.screen.withdraw(document, "malformed")
            tally.refuse(document.name, error.reason)
            return []
        tally.add_long_answers(document.name, num_too_long)
        if not sequences:
            self.screen.withdraw(document, "oversize")
        return sequences
