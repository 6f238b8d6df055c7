"""The worker's side of a cluster: executing a task, sending messages to the client, ignoring signals.

A worker of the local cluster preloads this module, which makes it ignore SIGINT and SIGTERM. Ctrl-C in a terminal and a
service manager's SIGTERM reach every process of the command; a worker that ended at once would lose the part it works
on while the client still waits for it. Dask ends the workers of a client that ends, and a worker whose parent process
is gone ends itself, whatever signals it ignores.
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
    """Called by Dask in a worker that preloads this module."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_client_id = ""


def send_message(message: Any) -> None:
    """Send a message from inside a task to the client; meant for a few messages per second at most."""
    from distributed import get_worker

    get_worker().log_event(TOPIC, (_client_id, message))


@functools.lru_cache(maxsize=1)
def _load_function(function: bytes) -> Callable[[Any], Any]:
    from distributed.protocol.pickle import loads

    return loads(function)  # type: ignore[no-any-return]


def run_task(request: tuple[str, bytes, bytes]) -> tuple[Any, str, float]:
    """Execute one task.

    Args:
        request: id of the client's cluster connection, then the function and the task, both pickled.

    Returns:
        The function's result, the worker's address, and the seconds that the function took.
    """
    from distributed import get_worker
    from distributed.protocol.pickle import loads

    global _client_id
    _client_id, function, task = request
    address = get_worker().address
    started = time.perf_counter()
    try:
        result = _load_function(function)(loads(task))
    except Exception as error:
        # Dask does not say to the client on which worker it was raised.
        error.add_note(address)
        raise
    return result, address, time.perf_counter() - started
