"""Processes of one gloo group, for the tests of what several ranks do together."""

from __future__ import annotations

import os
import socket

import torch
from torch import distributed, multiprocessing

# Each process is forked from one that has loaded these, which takes ten seconds.
multiprocessing.set_forkserver_preload(["torch", "transformers.trainer", "accelerate", "peft", "trl"])


def on_ranks(work, world_size, *arguments):
    """Run `work(rank, *arguments)` in processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _joined, (world_size, port, work, arguments), nprocs=world_size, start_method="forkserver"
    )


def _joined(rank, world_size, port, work, arguments):
    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    distributed.init_process_group("gloo")
    work(rank, *arguments)
    distributed.barrier()
    distributed.destroy_process_group()
