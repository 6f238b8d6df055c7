"""Moves damaged files aside, so that a repaired file can take their names.

A file is copied before it is removed, so nothing is lost that helps to find the cause. Copies are named by content, so
the same damage is stored once. `softshard gc` removes them.
"""

from __future__ import annotations

from collections.abc import Callable

from softshard.errors import DataInvalid
from softshard.records.digest import sha256_hex
from softshard.storage import Store

__all__ = ["QUARANTINE", "Quarantine"]

QUARANTINE = ".quarantine"


class Quarantine:
    """The quarantine of an output; `taken` lists the paths of the files that were moved here."""

    def __init__(self, store: Store, *, before_each: Callable[[], None] = lambda: None) -> None:
        self._store, self._before_each = store, before_each
        self.taken: list[str] = []

    def take(self, path: str) -> None:
        """Move an object of the output here, if it exists.

        Raises:
            DataInvalid: it cannot be read, and so not be moved.
        """
        self._before_each()
        try:
            content = self._store.read(path)
        except FileNotFoundError:
            return
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error}), and so not be set aside"
            raise DataInvalid(f"{self._store.uri}/{path}: {problem}; move it away and repair again") from error
        place = f"{QUARANTINE}/{path}.{sha256_hex(content)[:12]}"
        self._store.put_once(place, content)
        self._store.remove(path)
        self.taken.append(place)
