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
        self.not_read = NotRead()

    def add(self, raw: RawDocument) -> None:
        """Count a document."""
        self._num_documents += 1
        if raw.problem in _FAULTS:
            self._faults[raw.problem] += 1
            self._reasons[raw.reason] += 1
            self._first.setdefault(raw.reason, " ".join(raw.name.split()))

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
            remedy=_remedy(reason),
        )


def _remedy(reason: str) -> str:
    """What to do about documents that are left out for a reason; an empty one is that they cannot be decoded."""
    if not reason:
        return "set the source's `encoding`, for example to windows-1252"
    return "mend them" if reason.startswith("is not JSON") else "check the fields that the source names"
