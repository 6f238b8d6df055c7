"""Where a file goes that is not what it should be, so that a right one can take its name.

It is copied before it is removed: nothing is lost that could still tell what happened, and the same damage twice is one
file. `softshard gc` removes what lies there.
"""

from __future__ import annotations

from collections.abc import Callable

from softshard.errors import DataInvalid
from softshard.records.digest import sha256_hex
from softshard.storage import Store

__all__ = ["QUARANTINE", "Quarantine"]

QUARANTINE = ".quarantine"


class Quarantine:
    """The quarantine of an output; `taken` says where what it has taken lies."""

    def __init__(self, store: Store, *, before_each: Callable[[], None] = lambda: None) -> None:
        self._store, self._before_each = store, before_each
        self.taken: list[str] = []

    def take(self, path: str) -> None:
        """Move an object of the output here, if there is one.

        Raises:
            DataInvalid: it cannot be read, so it cannot be moved.
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
