"""Errors of a corpus that end the command with 3: a source cannot be read, or too little is left of it."""

from __future__ import annotations

from softshard.errors.base import DataInvalid

__all__ = ["ConversationRefused", "CorpusEmpty", "FoldEmpty", "SourceUnreadable", "TooMuchLeftOut"]


class ConversationRefused(DataInvalid):
    """A conversation that a chat template cannot render so that its answers are known; the corpus leaves it out."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class SourceUnreadable(DataInvalid):
    """A source of the corpus does not exist or cannot be read as its format."""

    def __init__(self, *, source: str, uri: str, problem: str) -> None:
        self.source, self.uri, self.problem = source, uri, problem
        super().__init__(f"{uri}: source {source!r}: {problem}")


class TooMuchLeftOut(DataInvalid):
    """More of a source's documents than the job allows cannot be decoded or have no text."""

    def __init__(
        self,
        *,
        source: str,
        uri: str,
        documents: int,
        outcomes: dict[str, int],
        first: str,
        allowed: float,
        remedy: str,
    ) -> None:
        self.source, self.uri, self.documents, self.outcomes = source, uri, documents, outcomes
        self.first, self.allowed, self.remedy = first, allowed, remedy
        left_out = sum(outcomes.values())
        listed = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
        super().__init__(
            f"{uri}: source {source!r}: {left_out:,} of its {documents:,} documents ({left_out / documents:.1%}) cannot"
            f" be used: {listed} (first: {first}); {remedy}, or set `corpus.max_left_out` above {allowed:g}"
        )


class CorpusEmpty(DataInvalid):
    """No document is left after screening, or a split is empty.

    `enough` is a hold-out fraction that would hold out one of the documents; `section` of the job names the sources.
    """

    def __init__(
        self,
        *,
        counts: dict[str, int],
        split: str | None = None,
        enough: float | None = None,
        section: str = "corpus",
    ) -> None:
        self.counts, self.split, self.enough, self.section = counts, split, enough, section
        seen = ", ".join(f"{count} {name}" for name, count in counts.items())
        text = "the corpus" if section == "corpus" else f"the text of {section}"
        where = f"the {split} split of {text}" if split else text
        remedy = f"check `{section}.sources` and `corpus.holdout_fraction`"
        if split is not None:
            change = "change `corpus.holdout_fraction`"
            if enough is not None and counts.get("kept", 0) > 1:
                change = f"set `corpus.holdout_fraction` to {enough:g} or more, which holds out one of them"
            remedy = (
                "documents are held out whole, by a hash of each, and these are too few for both splits: add"
                f" documents to `{section}.sources`, set `split_texts` of the source if a text holds several, or"
                f" {change}"
            )
        super().__init__(f"{where} has no documents ({seen}); {remedy}")


class FoldEmpty(DataInvalid):
    """A fold of the style teacher has no document to train on."""

    def __init__(self, *, fold: int, folds: int, documents: int) -> None:
        self.fold, self.folds, self.documents = fold, folds, documents
        super().__init__(
            f"corpus: style teacher {fold} of {folds} would have no document to train on"
            f" ({documents} documents in all); add documents, set `split_texts` of the source where a text holds"
            " several, or set `teacher.folds: 0` to use the model unadapted"
        )
