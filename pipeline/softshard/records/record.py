"""Base classes of the records that are stored as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from softshard.records.digest import members_digest
from softshard.records.spool import Spool

__all__ = ["Record", "SpooledRecord"]


class Record(BaseModel):
    """A stored record: it cannot be changed and takes no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SpooledRecord(Record):
    """A record with long lists that are kept in spools, which must be complete when the record is made."""

    left_out_of_digest: ClassVar[frozenset[str]] = frozenset()
    """Fields that the digest does not cover."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the record's canonical JSON. Computed when first asked for, in one pass over the spools."""
        return members_digest(self.members(exclude=self.left_out_of_digest))

    def members(self, *, exclude: frozenset[str] = frozenset()) -> dict[str, Any]:
        """Plain values of the fields by name; of a spool, an iterator over its plain records."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in exclude}
        spools = {name: value for name, value in values.items() if isinstance(value, Spool)}
        return self.model_dump(mode="json", exclude={*exclude, *spools}) | {
            name: spool.plain() for name, spool in spools.items()
        }

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, which has a digest of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("digest", None)
        return copied
