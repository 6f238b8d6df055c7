"""The tally of a corpus by split and fold, and the refusal of one that cannot be trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from softshard.config import CorpusSettings
from softshard.corpus.screen import ScreenedDocument, Split
from softshard.corpus.windows import num_windows
from softshard.errors import CorpusEmpty, FoldEmpty

__all__ = ["CorpusCount", "SplitCount", "Tally"]


class SplitCount(BaseModel):
    """What one fold of one split holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    split: Literal["train", "test"]
    fold: int
    """-1: none."""
    num_documents: int = 0
    num_bytes_text: int = 0
    """UTF-8 bytes of the documents."""
    num_tokens: int = 0
    """Tokens of the sequences, those that windows share counted in each: what a model has to read."""
    num_labels: int = 0
    num_sequences: int = 0
    num_slices: int = 0


class CorpusCount(BaseModel):
    """What a corpus would be, without one having been written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    counts: dict[str, int]
    """Documents by outcome of the screening."""
    splits: tuple[SplitCount, ...]
    """The train split by fold, then the test split."""

    def total(self, split: str | None = None) -> dict[str, int]:
        """Sum of every `num_` field over the folds of a split, or over all."""
        chosen = [part for part in self.splits if split in {None, part.split}]
        names = [name for name in SplitCount.model_fields if name.startswith("num_")]
        return {name: sum(getattr(part, name) for part in chosen) for name in names}


class Tally:
    """Counts documents and their windows as they pass."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._parts: dict[tuple[Split, int], SplitCount] = {}

    def add(self, document: ScreenedDocument, *, num_tokens: int) -> int:
        """Count a document of num_tokens tokens, opening and closing ones counted; the number of its windows."""
        settings = self._settings
        windows = num_windows(
            num_tokens, context_tokens=settings.context_tokens, overlap_tokens=settings.overlap_tokens
        )
        place = (document.split, document.fold)
        part = self._parts.get(place) or SplitCount(split=document.split, fold=document.fold)
        num_sequences = part.num_sequences + windows
        self._parts[place] = part.model_copy(
            update={
                "num_documents": part.num_documents + 1,
                "num_bytes_text": part.num_bytes_text + document.num_bytes,
                "num_tokens": part.num_tokens + num_tokens + (windows - 1) * settings.overlap_tokens,
                "num_labels": part.num_labels + num_tokens - 1,
                "num_sequences": num_sequences,
                "num_slices": -(-num_sequences // settings.sequences_per_part),
            }
        )
        return windows

    def checked(self, counts: dict[str, int], *, folds: int) -> CorpusCount:
        """The tally of a corpus that can be trained on.

        Raises:
            CorpusEmpty: there is no document, none to train on, or none held out though a share was to be.
            FoldEmpty: all train documents are in one fold, so the style teacher of that fold has none.
        """
        if not self._parts:
            raise CorpusEmpty(counts=counts)
        for split in ("train", "test") if self._settings.holdout_fraction else ("train",):
            if not any(part.split == split for part in self._parts.values()):
                raise CorpusEmpty(counts=counts, split=split)
        train = {fold: part.num_documents for (split, fold), part in self._parts.items() if split == "train"}
        if folds and len(train) == 1:
            fold, documents = next(iter(train.items()))
            raise FoldEmpty(fold=fold, folds=folds, documents=documents)
        splits = sorted(self._parts.values(), key=lambda part: (part.split == "test", part.fold))
        return CorpusCount(counts=counts, splits=tuple(splits))
