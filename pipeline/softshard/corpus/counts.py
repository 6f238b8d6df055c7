"""Counts a corpus by split, fold and group, and refuses one that cannot be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from softshard.config import CorpusSettings
from softshard.corpus.boundaries import SliceCutter
from softshard.corpus.screen import Screen, ScreenedDocument, Split
from softshard.corpus.tally import FilesNotRead
from softshard.errors import CorpusEmpty, FoldEmpty
from softshard.records.record import Record
from softshard.sketch.types import TokenSequence

__all__ = ["CorpusCount", "CorpusCounter", "DocumentCount", "GroupCount", "SplitCount"]


class DocumentCount(NamedTuple):
    """Sequences and labels of one document."""

    num_sequences: int
    num_labels: int


class GroupCount(NamedTuple):
    """Labels of the train documents of one source, style, group and fold."""

    source: str
    style: str
    group: str
    fold: int
    num_labels: int


class SplitCount(Record):
    """Counts of one fold of one split."""

    split: Literal["train", "test"]
    fold: int
    """-1: none."""
    num_documents: int = 0
    num_bytes_text: int = 0
    """UTF-8 bytes of the documents."""
    num_tokens: int = 0
    """Tokens of the sequences, with the tokens that windows share counted in each: what a model has to read."""
    num_labels: int = 0
    num_sequences: int = 0
    num_slices: int = 0


class CorpusCount(Record):
    """Counts of a whole corpus, which need not have been written."""

    counts: dict[str, int]
    """Documents by outcome of the screening."""
    splits: tuple[SplitCount, ...]
    """The train split by fold, then the test split."""
    groups: tuple[GroupCount, ...] = ()
    """Of the train split, sorted."""
    not_read: tuple[FilesNotRead, ...] = ()
    """By source, where files of it are not read."""

    def total(self, split: str | None = None) -> dict[str, int]:
        """Sum of every `num_` field over the folds of a split, or over all."""
        chosen = [part for part in self.splits if split in {None, part.split}]
        names = [name for name in SplitCount.model_fields if name.startswith("num_")]
        return {name: sum(getattr(part, name) for part in chosen) for name in names}


@dataclass(slots=True)
class _FoldCounts:
    """Counts of one split and fold so far; the sequences in `cutter` are in no slice yet."""

    cutter: SliceCutter
    num_documents: int = 0
    num_bytes_text: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    num_sequences: int = 0
    num_full_slices: int = 0


class CorpusCounter:
    """Counts documents, their sequences and the slices of these, one document after another."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._parts: dict[tuple[Split, int], _FoldCounts] = {}
        self._groups: Counter[tuple[str, str, str, int]] = Counter()

    def add(self, document: ScreenedDocument, sequences: Iterable[TokenSequence]) -> DocumentCount:
        """Count a document and its sequences."""
        place = (document.split, document.fold)
        part = self._parts.get(place)
        if part is None:
            part = self._parts[place] = _FoldCounts(cutter=SliceCutter(max_length=self._settings.sequences_per_part))
        num_sequences = num_labels = 0
        for sequence in sequences:
            part.num_full_slices += part.cutter.add(sequence.sequence_id) > 0
            part.num_tokens += len(sequence.token_ids)
            num_labels += sequence.num_labels
            num_sequences += 1
        if document.split == "train":
            self._groups[document.source, document.style, document.group, document.fold] += num_labels
        part.num_documents += 1
        part.num_bytes_text += document.num_bytes
        part.num_labels += num_labels
        part.num_sequences += num_sequences
        return DocumentCount(num_sequences=num_sequences, num_labels=num_labels)

    def finish(self, screen: Screen, *, folds: int) -> CorpusCount:
        """The counts of a corpus that can be trained on.

        Raises:
            CorpusEmpty: there is no document, no train document, or no test document although `holdout_fraction` is
                above 0.
            FoldEmpty: all train documents are in one fold, so the style teacher of that fold has none.
        """
        counts = screen.counts
        if not self._parts:
            raise CorpusEmpty(counts=counts)
        for split in ("train", "test") if self._settings.holdout_fraction else ("train",):
            if not any(place == split for place, _ in self._parts):
                enough = screen.least_holdout_fraction if split == "test" else None
                raise CorpusEmpty(counts=counts, split=split, enough=enough)
        train = {fold: part.num_documents for (split, fold), part in self._parts.items() if split == "train"}
        if folds and len(train) == 1:
            fold, documents = next(iter(train.items()))
            raise FoldEmpty(fold=fold, folds=folds, documents=documents)
        splits = (_split_count(place, self._parts[place]) for place in sorted(self._parts, key=_order))
        groups = (GroupCount(*place, num_labels) for place, num_labels in sorted(self._groups.items()))
        return CorpusCount(counts=counts, splits=tuple(splits), groups=tuple(groups))


def _order(place: tuple[Split, int]) -> tuple[bool, int]:
    split, fold = place
    return split == "test", fold


def _split_count(place: tuple[Split, int], part: _FoldCounts) -> SplitCount:
    split, fold = place
    return SplitCount(
        split=split,
        fold=fold,
        num_documents=part.num_documents,
        num_bytes_text=part.num_bytes_text,
        num_tokens=part.num_tokens,
        num_labels=part.num_labels,
        num_sequences=part.num_sequences,
        num_slices=part.num_full_slices + (part.cutter.num_waiting > 0),
    )
