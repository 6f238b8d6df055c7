"""Long lists of records, kept in an unnamed temporary file with one line of JSON per record.

A spool takes eight bytes of memory per record, whatever the size of the record. It is read in order, as often as
needed, or by index.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, get_args, overload

from pydantic import BaseModel, GetCoreSchemaHandler, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from softshard.errors import StorageFull

__all__ = ["Spool", "temporary_disk"]

Record = TypeVar("Record", bound=BaseModel)
_BLOCK_BYTES = 2**18


class Spool(Sequence[Record], Generic[Record]):
    """A sequence of records of one class. As a field of another record it is dumped and validated as a list."""

    def __init__(self, kind: type[Record], records: Iterable[Record] = ()) -> None:
        self._kind = kind
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the spool
        self._starts = array("Q", [0])
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Add a record at the end. Raises StorageFull when the folder for temporary files is full."""
        line = json.dumps(record.model_dump(mode="json"), ensure_ascii=False).encode() + b"\n"
        with temporary_disk():
            self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))

    def lines(self) -> Iterator[bytes]:
        """The records, each as one line of JSON."""
        self._flush()
        end, position, rest = self._starts[-1], 0, b""
        while position < end:
            block = os.pread(self._file.fileno(), min(_BLOCK_BYTES, end - position), position)
            position += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from lines

    def plain(self) -> Iterator[dict[str, Any]]:
        """The records as plain values, which are not validated again: three times as fast as the records."""
        return map(json.loads, self.lines())

    def __iter__(self) -> Iterator[Record]:
        return map(self._kind.model_validate_json, self.lines())

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        places = range(len(self))[place]
        return self._at(places) if isinstance(places, int) else [self._at(index) for index in places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spool) and len(self) == len(other) and list(self.lines()) == list(other.lines())

    def __reduce__(self) -> tuple[Any, ...]:
        return Spool, (self._kind, list(self))

    def _at(self, place: int) -> Record:
        self._flush()
        start, end = self._starts[place], self._starts[place + 1]
        return self._kind.model_validate_json(os.pread(self._file.fileno(), end - start, start))

    def _flush(self) -> None:
        with temporary_disk():
            self._file.flush()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (kind,) = get_args(source)

        def validate(value: Any, as_list: ValidatorFunctionWrapHandler) -> Spool[Any]:
            return value if isinstance(value, Spool) else Spool(kind, as_list(value))

        def plain(spool: Spool[Any]) -> list[Any]:
            return list(spool.plain())

        return core_schema.no_info_wrap_validator_function(
            validate,
            core_schema.list_schema(handler.generate_schema(kind)),
            serialization=core_schema.plain_serializer_function_ser_schema(plain),
        )


@contextmanager
def temporary_disk() -> Iterator[None]:
    """Inside this context, raise StorageFull when the folder for temporary files is full."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFull(uri=tempfile.gettempdir()) from error
        raise
