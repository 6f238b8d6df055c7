"""What runs on a worker: the function that a task is for, what it tells the client, and how a local one is stopped.

A worker of the local cluster loads this module first and leaves being stopped to the client. Ctrl-C in a terminal and a
service manager's SIGTERM reach every process of the command; a worker that ended at once would take the part in hand
with it, while the client still waits for it. Dask ends the workers of a client that ends, and a worker whose parent is
gone ends itself, whatever signals it ignores.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

__all__ = ["TOPIC", "dask_setup", "run_task", "send_message"]

TOPIC = "softshard"


def dask_setup(worker: Any) -> None:
    """Called by Dask in a worker that starts with this module."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_run_of_task = ""


def send_message(message: Any) -> None:
    """From inside a task: tell the client something, at most a few times a second."""
    from distributed import get_worker

    get_worker().log_event(TOPIC, (_run_of_task, message))


@functools.lru_cache(maxsize=1)
def _loaded(function: bytes) -> Callable[[Any], Any]:
    from distributed.protocol.pickle import loads

    return loads(function)  # type: ignore[no-any-return]


def run_task(order: tuple[str, bytes, bytes]) -> tuple[Any, str, float]:
    """Run a task.

    Args:
        order: id of the run that it belongs to, the function, the task; the last two pickled.

    Returns:
        What the function returned, the worker's address, and the seconds that it took.
    """
    from distributed import get_worker
    from distributed.protocol.pickle import loads

    global _run_of_task
    _run_of_task, function, task = order
    address = get_worker().address
    started = time.perf_counter()
    try:
        result = _loaded(function)(loads(task))
    except Exception as error:
        # Dask does not tell the client which worker it was.
        error.add_note(address)
        raise
    return result, address, time.perf_counter() - started
