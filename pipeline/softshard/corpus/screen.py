"""Screens raw documents: normalises them, drops unusable ones and duplicates, and assigns a split and a fold.

The hold-out is chosen by a hash of (seed, text) directly after normalisation, so it depends only on the seed, the text
and the fraction, and not on the order or on other documents. A larger fraction only adds documents to it.

Of documents that are duplicates the first is kept, as it is written there; so no text is in two splits or two folds.
What makes two documents duplicates is a setting (`Duplicates`), by default equal text apart from white space: the same
text from a JSON field and from a file often differs in a final newline. About 100 bytes per document are kept in
memory to find them, and with `near_duplicates` 3 kB more.

With every Unicode form, line ends become LF and NUL characters are dropped: neither is part of the writing.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from softshard.config import CorpusSettings, Duplicates, SourceSettings
from softshard.corpus.similarity import similarity_keys
from softshard.sources.documents import RawDocument, Turns

__all__ = [
    "Screen",
    "ScreenedDocument",
    "Split",
    "assign_fold",
    "assign_split",
    "make_document_id",
    "make_duplicate_key",
    "normalise",
]

Split = Literal["train", "test"]
Outcome = Literal["empty", "oversize", "malformed"]
"""What a document that was kept may turn out to be."""

_PIECE_CHARACTERS = 2**16
_SPACE = re.compile(r"\s")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenedDocument:
    """A document that is kept."""

    document_id: str
    """blake2b-128, in hex, of the text in UTF-8."""
    name: str
    """Where it was read, for messages."""
    text: str
    """Normalised."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    source: str
    style: str
    group: str
    split: Split
    fold: int
    """Fold of a train document; -1 for a test document, and where there are no folds."""
    views: tuple[Turns, ...] = ()
    """The turns of a conversation, once for each person who answers in it, normalised; empty for a text."""


def normalise(text: str, *, form: Literal["NFC", "NFKC", "none"]) -> str:
    """Text with LF line ends, without NUL, in a Unicode form; idempotent."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return plain if form == "none" else unicodedata.normalize(form, plain)


def make_document_id(text: str) -> str:
    """blake2b-128, in hex, of a normalised text in UTF-8."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_duplicate_key(text: str, *, by: Duplicates) -> bytes:
    """16 bytes that are equal for documents that are duplicates of each other.

    Args:
        text: normalised.
        by: `exact`: the text; `spacing`: its words, divided by white space; `words`: its runs of letters and digits,
            whatever their case, or the same as `spacing` for a text without any.
    """
    if by == "exact":
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    spelling = str.split if by == "spacing" or _WORD.search(text) is None else _plain_words
    digest = hashlib.blake2b(digest_size=16)
    for piece in _pieces(text):
        if words := spelling(piece):
            digest.update(f"{' '.join(words)} ".encode())
    return digest.digest()


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with white space: a list of all words of a long text would be large."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PIECE_CHARACTERS)
        stop = len(text) if space is None else space.end()
        yield text[start:stop]
        start = stop


def _plain_words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def assign_split(document_id: str, *, seed: int, holdout_fraction: float) -> Split:
    """`test` where a hash of (seed, document_id), as a number in [0, 1), is below the fraction."""
    return "test" if _hash(seed, document_id, "holdout") < holdout_fraction * 2**64 else "train"


def assign_fold(document_id: str, *, seed: int, folds: int) -> int:
    """Fold of a train document, from another hash of (seed, document_id); -1 where there are no folds."""
    return _hash(seed, document_id, "fold") % folds if folds else -1


def _hash(seed: int, document_id: str, purpose: str) -> int:
    digest = hashlib.blake2b(f"{purpose} {seed} {document_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class Screen:
    """Keeps or drops documents one after another, and counts the outcomes."""

    def __init__(self, settings: CorpusSettings, *, folds: int, seed: int) -> None:
        self._settings, self._folds, self._seed = settings, folds, seed
        self._keys: set[bytes] = set()
        self._similar: set[int] = set()
        self._first: dict[str, str] = {}
        self._least_hash = 2**64
        self._counts = dict.fromkeys(("kept", "empty", "undecodable", "oversize", "malformed", "duplicate"), 0)

    @property
    def counts(self) -> dict[str, int]:
        """Documents by outcome: kept, empty, undecodable, oversize, malformed, duplicate; near_duplicate and dropped if
        any is.
        """
        return dict(self._counts)

    @property
    def least_holdout_fraction(self) -> float | None:
        """The smallest fraction, in hundredths, that holds out one of the kept documents; None where it would be 1."""
        fraction = (self._least_hash * 100 // 2**64 + 1) / 100
        return fraction if fraction < 1 else None

    @property
    def num_seen(self) -> int:
        """Number of documents so far, kept or not."""
        return sum(self._counts.values())

    def admit(self, raw: RawDocument, *, source: SourceSettings) -> ScreenedDocument | None:
        """The screened document, or None for one that is dropped; of duplicates the first is kept."""
        if raw.text is None:
            assert raw.problem is not None
            self._leave_out(raw.problem, raw.name)
            return None
        text = normalise(raw.text, form=self._settings.normalisation)
        document_id = make_document_id(text)
        fraction = self._settings.holdout_fraction
        split = assign_split(document_id, seed=self._seed, holdout_fraction=fraction)
        if not text or text.isspace():
            self._leave_out("empty", raw.name)
            return None
        if (key := make_duplicate_key(text, by=self._settings.duplicates)) in self._keys:
            self._leave_out("duplicate", raw.name)
            return None
        if self._settings.near_duplicates:
            similar = similarity_keys(map(_plain_words, _pieces(text)))
            if not self._similar.isdisjoint(similar):
                self._leave_out("near_duplicate", raw.name)
                return None
            self._similar.update(similar)
        self._keys.add(key)
        self._least_hash = min(self._least_hash, _hash(self._seed, document_id, "holdout"))
        self._counts["kept"] += 1
        return ScreenedDocument(
            document_id=document_id,
            name=raw.name,
            text=text,
            num_bytes=len(text.encode()),
            source=source.name,
            style=source.style,
            group=raw.group,
            split=split,
            fold=assign_fold(document_id, seed=self._seed, folds=self._folds) if split == "train" else -1,
            views=tuple(self._normalised(view) for view in raw.views),
        )

    def _normalised(self, turns: Turns) -> Turns:
        form = self._settings.normalisation
        return tuple(replace(turn, text=normalise(turn.text, form=form)) for turn in turns)

    def withdraw(self, document: ScreenedDocument, outcome: Outcome = "empty") -> None:
        """Count a kept document in another way: as empty, because its text has no token, or what its rendering says."""
        self._counts["kept"] -= 1
        self._leave_out(outcome, document.name)

    def summary(self) -> str:
        """One line: what was kept, what was left out, and the first document of each problem."""
        problems = [
            f"{count:,} {outcome} (first: {self._first[outcome]})"
            for outcome, count in self._counts.items()
            if outcome != "kept" and count
        ]
        left_out = f"; left out {', '.join(problems)}" if problems else ""
        return f"corpus: {self._counts['kept']:,} of {self.num_seen:,} documents kept{left_out}"

    def _leave_out(self, outcome: str, name: str) -> None:
        self._counts[outcome] = self._counts.get(outcome, 0) + 1
        # A file name may contain a newline, and the summary is one line.
        self._first.setdefault(outcome, " ".join(name.split()))
