"""Being asked to stop: SIGTERM from a service manager or a scheduler of jobs, SIGINT from a terminal.

In: what to do about the first signal. Guaranteed: the second one does what it did before, so that nobody waits longer
than they want to; a signal that the process was started to ignore stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["on_first_signal"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_first_signal(handle: Callable[[str], None]) -> Iterator[None]:
    """While the context lasts, give the name of the first signal to `handle`, which must be quick and not raise.

    Only the main thread can be asked; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = [number for number, handler in before.items() if handler not in {signal.SIG_IGN, None}]

    def restore() -> None:
        for number in ours:
            signal.signal(number, before[number])

    def hear(number: int, frame: FrameType | None) -> None:
        restore()
        handle(signal.Signals(number).name)

    for number in ours:
        signal.signal(number, hear)
    try:
        yield
    finally:
        restore()
