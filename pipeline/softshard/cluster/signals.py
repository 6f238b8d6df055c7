"""Handling the first SIGTERM (from a service manager or a job scheduler) or SIGINT (from a terminal).

A second signal has its previous effect, which ends the process at once. A signal that the process was started to ignore
stays ignored.
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
    """While the context lasts, call `handle` with the name of the first signal; it must be quick and not raise.

    Python delivers signals to the main thread only; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number, handler in previous.items() if handler not in {signal.SIG_IGN, None}]

    def restore() -> None:
        for number in handled:
            signal.signal(number, previous[number])

    def on_signal(number: int, frame: FrameType | None) -> None:
        restore()
        handle(signal.Signals(number).name)

    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        restore()
