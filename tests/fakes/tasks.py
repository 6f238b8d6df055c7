"""Tasks for a cluster, by what they do. Workers import this module: torch, which takes seconds, is not loaded by it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from distributed import get_worker

from softshard.cluster.worker import send_message
from softshard.errors import DataInvalid, EngineNotOpened, StorageFull


def first_time(marker):
    """True once for each marker, over all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def is_sick(marker):
    """Whether this worker is the one that a file beside the marker names, or its process, or one of any."""
    sick = Path(marker).with_name("sick")
    return sick.exists() and sick.read_text() in {"all", str(get_worker().name), f"process {os.getpid()}"}


def first_process_is_sick(marker):
    """Name the process of whichever worker comes first, with which the engine then never opens."""
    if first_time(marker):
        Path(marker).with_name("sick").write_text(f"process {os.getpid()}")


def task(order):
    what, marker = order
    if what == "fails where it began":
        began = Path(marker)
        here = get_worker().address
        if not began.exists():
            began.write_text(here)
            raise OSError("the network went away")
        return began.read_text(), here
    if what == "always dies":
        os._exit(9)
    if what == "sleeps":
        time.sleep(1)
    if what == "dies once" and first_time(marker):
        os._exit(9)
    if what == "fails once" and first_time(marker):
        raise OSError("the network went away")
    if what == "always fails":
        raise OSError("the network is gone")
    if what == "bad data":
        raise DataInvalid("this cannot be right")
    if what == "full":
        raise StorageFull(uri="out")
    if what == "bug":
        raise TypeError("a bug")
    if what == "breaks its process":
        first_process_is_sick(marker)
    if what == "device is lost":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if what.startswith("needs an engine") and is_sick(marker):
        raise EngineNotOpened(engine="tiny", problem="CUDA error: an illegal memory access was encountered")
    if what == "speaks":
        send_message({"said": "hello"})
    return what.upper()


def run_orders(cluster, tmp_path, *orders, heard=None, **told):
    results = {}

    def on_result(order, result, execution):
        results[order[0]] = result
        if heard is not None:
            heard.append(order[0])

    failures = cluster.map_tasks(
        task,
        [(what, str(tmp_path / f"{index}")) for index, what in enumerate(orders)],
        name=lambda order: f"{Path(order[1]).parent.name}-{Path(order[1]).name}",
        on_result=on_result,
        **told,
    )
    return results, failures


def return_and_die(order):
    number, marker = order
    if number % 5 == 0 and first_time(f"{marker}-{number}"):
        threading.Timer(number / 2_000, os._exit, [9]).start()
    return number
