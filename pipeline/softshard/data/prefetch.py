"""A thread that makes the items of an iterator ahead of their use.

In: an iterator. Out: the same items in the same order, or the same error at the same place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

__all__ = ["prefetched"]

_PATIENCE_S = 1.0

_Item = TypeVar("_Item")


def prefetched(items: Iterator[_Item], *, ahead: int) -> Generator[_Item]:
    """The items, at most `ahead` of them made before they are requested; 0: none, and no thread.

    Closing the generator ends the thread once the current item is made, and waits for that for at most a second: Ctrl-C
    must not hang on a store that does not respond.
    """
    if not ahead:
        yield from items
        return
    made: queue.SimpleQueue[tuple[_Item | None, BaseException | None]] = queue.SimpleQueue()
    room, closed = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            for item in items:
                made.put((item, None))
                room.acquire()
                if closed.is_set():
                    return
            made.put((None, StopIteration()))
        # Any failure of this thread is recorded here, and raised again where the next item is taken. Otherwise even
        # SystemExit would end this thread alone, and the consumer would wait forever.
        except BaseException as error:  # noqa: BLE001
            made.put((None, error))

    thread = threading.Thread(target=work, name="softshard-prefetch", daemon=True)
    room.acquire()
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]  # without an error there is an item
    finally:
        closed.set()
        room.release()
        thread.join(timeout=_PATIENCE_S)
