"""What became of the documents of one source while it was read, and whether too many of them could not be used.

A document that cannot be decoded or has no text where it should be is a fault of the data or of the settings; one that
is empty, a duplicate, too long or dropped is screened on purpose and never counts as such.
"""

from __future__ import annotations

from collections import Counter

from softshard.config import SourceSettings
from softshard.errors import SourceUnreadable, TooMuchLeftOut
from softshard.records.record import Record
from softshard.sources.documents import RawDocument
from softshard.sources.not_read import NotRead
from softshard.telemetry import Reporter

__all__ = ["FilesNotRead", "SourceTally"]

_FAULTS = ("undecodable", "malformed")


class FilesNotRead(Record):
    """Files of a source that were not read."""

    source: str
    num_files: int
    kinds: dict[str, int]
    """Number of files by what they are: their ending, or why they are left out."""
    text: str
    """In one line, with the first of them."""


class SourceTally:
    """Counts the documents of a source, one after another."""

    def __init__(self, source: SourceSettings) -> None:
        self._source = source
        self._num_documents = 0
        self._faults: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._num_long_answers = 0
        self._first_long_answer = ""
        self.not_read = NotRead()

    def add(self, raw: RawDocument) -> None:
        """Count a document."""
        self._num_documents += 1
        if raw.problem in _FAULTS:
            self._add_fault(raw.problem, raw.reason, raw.name)

    def refuse(self, name: str, reason: str) -> None:
        """Count a document that was added, and whose conversation cannot be rendered."""
        self._add_fault("malformed", reason, name)

    def _add_fault(self, problem: str, reason: str, name: str) -> None:
        self._faults[problem] += 1
        self._reasons[reason] += 1
        self._first.setdefault(reason, " ".join(name.split()))

    def add_long_answers(self, name: str, num_answers: int) -> None:
        """Count answers of a conversation that are longer than a sequence, and are labels of none."""
        if num_answers:
            self._num_long_answers += num_answers
            self._first_long_answer = self._first_long_answer or " ".join(name.split())

    def files_not_read(self) -> tuple[FilesNotRead, ...]:
        """The files that were not read, as one entry or none."""
        unread = self.not_read
        if not unread.num_files:
            return ()
        entry = FilesNotRead(
            source=self._source.name, num_files=unread.num_files, kinds=unread.kinds, text=unread.describe()
        )
        return (entry,)

    def finish(self, reporter: Reporter, *, max_left_out: float) -> None:
        """Report what was read and what was not.

        Raises:
            SourceUnreadable: no document has text, in every one for a reason of its form.
            TooMuchLeftOut: more than a share of `max_left_out` cannot be used.
        """
        source, unread = self._source, self.not_read
        if unread.num_files:
            reporter.say(f"source {source.name!r}: {unread.describe()}")
            kinds = ", ".join(f"{count} {kind}" for kind, count in unread.kinds.items())
            reporter.event(
                "files_not_read", source=source.name, files=unread.num_files, kinds=kinds, level=unread.level
            )
        if self._num_long_answers:
            counted = f"{self._num_long_answers:,} answer{'s' if self._num_long_answers != 1 else ''}"
            reporter.say(
                f"source {source.name!r}: {counted} left out, too long for `corpus.context_tokens` with the question"
                f" (first: {self._first_long_answer})"
            )
            reporter.event("answers_left_out", source=source.name, answers=self._num_long_answers, level="warning")
        faults = {name: self._faults[name] for name in _FAULTS if self._faults[name]}
        left_out = sum(faults.values())
        share = left_out / max(1, self._num_documents)
        reporter.event(
            "source_read",
            source=source.name,
            documents=self._num_documents,
            undecodable=self._faults["undecodable"],
            malformed=self._faults["malformed"],
            left_out=round(share, 6),
            allowed=max_left_out,
            level="warning" if share > max_left_out or not self._num_documents else "info",
        )
        if share > max_left_out or 0 < self._num_documents == self._faults["malformed"]:
            self._refuse(faults, max_left_out)

    def _refuse(self, faults: dict[str, int], max_left_out: float) -> None:
        source, (reason, count) = self._source, self._reasons.most_common(1)[0]
        first = self._first[reason]
        if count == self._num_documents and reason:
            if reason == f"has no field {source.text_field!r}":
                problem = f"none of its {count} documents has text in the field {source.text_field!r}"
                raise SourceUnreadable(source=source.name, uri=source.uri, problem=f"{problem}; check `text_field`")
            problem = f"none of its {count} documents can be used: {first}: {reason}"
            raise SourceUnreadable(source=source.name, uri=source.uri, problem=problem)
        raise TooMuchLeftOut(
            source=source.name,
            uri=source.uri,
            documents=self._num_documents,
            outcomes=faults,
            first=f"{first}: {reason}" if reason else first,
            allowed=max_left_out,
            remedy=_remedy(reason, source),
        )


def _remedy(reason: str, source: SourceSettings) -> str:
    """What to do about documents that are left out for a reason; an empty one is that they cannot be decoded."""
    if not reason:
        return "set the source's `encoding`, for example to windows-1252"
    if reason.startswith("is not JSON"):
        return "mend them"
    if source.layout != "text":
        return "check the source's `layout`, `roles` and `answers`"
    return "check the fields that the source names"
