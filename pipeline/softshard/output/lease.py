"""The lease of an output: at most one run works on it at a time.

A lease is a file `.lease/00000N.json`, created exclusively; the highest number holds. Its holder increments a counter
in it every few seconds. A run that finds a lease takes over at once where the holder was a process of this machine that
has ended. Otherwise it watches the file: if it changes, the holder is alive; if it has not changed for `expiry_seconds`
of the watcher's own monotonic clock, the holder is taken for dead, and the next number is created. No two clocks are
compared, so a clock that jumps changes nothing. A clean end removes the file.

Guaranteed: of runs that start at the same time one continues, and a run that was taken for dead while it was suspended,
or cut off from its storage, ends at its next check. Not guaranteed: that it writes nothing before that. So no file
relies on the lease: parts, receipts and slices are created exclusively, and two runs can never mix theirs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from softshard.errors import LeaseLost, OutputBusy, SoftshardError, TryAgain
from softshard.records.canonical import canonical_json
from softshard.storage import Store

__all__ = ["LEASE_FOLDER", "Holder", "Lease", "Pace", "hold_lease"]

LEASE_FOLDER = ".lease"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often a lease is renewed, and after which time without renewal it expires."""

    interval_seconds: float = 5.0
    expiry_seconds: float = 60.0


class Holder(BaseModel):
    """The content of a lease file: the run that holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    job: str
    host: str
    pid: int
    started: str
    """Time by the clock of its machine; for display only."""
    kernel: str | None
    """Boot id and process namespace in which `pid` is valid; null where the system does not say."""
    process_start: str | None
    """Start of the process, in ticks since boot, because process ids are reused."""
    token: str
    """Random, different for every lease."""
    beat: int = 0

    def __str__(self) -> str:
        """For messages."""
        return f"run {self.run} of job {self.job!r} on {self.host}, process {self.pid}, since {self.started}"


class Lease:
    """A lease that this process holds; a thread renews it."""

    def __init__(self, store: Store, *, number: int, holder: Holder, pace: Pace) -> None:
        self._store, self._number, self._holder, self._pace = store, number, holder, pace
        self._ended = threading.Event()
        self._lost: LeaseLost | None = None
        self._stopping = _stopping_signal()
        self._thread = threading.Thread(target=self._renew_until_ended, name="softshard-lease", daemon=True)

    def check(self) -> None:
        """Raise LeaseLost where the lease was lost; reads no file."""
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it until the context ends. When it is lost, the main thread is stopped as by Ctrl-C or SIGTERM."""
        self._thread.start()
        try:
            yield
        except (KeyboardInterrupt, TryAgain):
            self.check()
            raise
        finally:
            self._ended.set()
            self._thread.join()

    def release(self) -> None:
        """Remove it and those that it took over; a lost lease belongs to its new holder and stays."""
        if self._lost is None and _read(self._store, self._number) == canonical_json(self._holder):
            for number in _numbers(self._store):
                if number <= self._number:
                    self._store.remove(_path(number))

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(self._pace.interval_seconds):
            # A store that does not answer is an error for the stages; the next renewal shows what happened meanwhile.
            with contextlib.suppress(OSError, SoftshardError):
                self._renew()
            if self._lost is not None:
                if self._stopping is not None:
                    signal.pthread_kill(threading.main_thread().ident or 0, self._stopping)
                return

    def _renew(self) -> None:
        newest = max(_numbers(self._store), default=0)
        if newest > self._number or _read(self._store, self._number) != canonical_json(self._holder):
            other = _parse_holder(_read(self._store, newest)) if newest > self._number else None
            self._lost = LeaseLost(out=self._store.uri, other=str(other) if other else None)
            return
        renewed = self._holder.model_copy(update={"beat": self._holder.beat + 1})
        self._store.replace(_path(self._number), canonical_json(renewed))
        self._holder = renewed


@contextmanager
def hold_lease(store: Store, *, job: str, run: str, pace: Pace | None = None) -> Iterator[Lease]:
    """The lease of an output, held while the context lasts.

    Args:
        store: the output folder.
        job: name of the job, for the error of a run that is refused.
        run: id of this run, likewise.
        pace: for tests; by default renewed every 5 s, expired after 60 s.

    Raises:
        OutputBusy: another run holds it.
        LeaseLost: another run has taken it over; raised inside the context.
        StorageFull, OutputUnusable: it cannot be written.
    """
    pace = pace or Pace()
    holder = _this_process(job=job, run=run)
    lease = Lease(store, number=_take(store, holder, pace), holder=holder, pace=pace)
    try:
        with lease.renewed():
            yield lease
    finally:
        # A file that cannot be removed expires.
        with contextlib.suppress(OSError, SoftshardError):
            lease.release()


def _stopping_signal() -> signal.Signals | None:
    """The signal that stops this thread in an orderly way; None where it is not the main thread, or no signal does."""
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return signal.SIGINT
    # A shell's background jobs ignore SIGINT.
    return signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else None


def _take(store: Store, holder: Holder, pace: Pace) -> int:
    """Create the next lease once the newest one is released or its holder is dead. Raises OutputBusy."""
    while True:
        number = max(_numbers(store), default=0)
        there = _read(store, number) if number else None
        if there is not None:
            _wait_for_end(store, number, there, pace)
        if not store.create_exclusive(_path(number + 1), canonical_json(holder)):
            continue
        # Between reading and creating, another run may have taken over the lease that was judged dead.
        if max(_numbers(store)) == number + 1 and _read(store, number) in {there, None}:
            return number + 1
        store.remove(_path(number + 1))


def _wait_for_end(store: Store, number: int, first: bytes, pace: Pace) -> None:
    """Return when a lease is released, its process has ended, or it has expired. Raises OutputBusy when it changes."""
    holder = _parse_holder(first)
    found = time.monotonic()
    while not (holder and _is_gone(holder)) and time.monotonic() - found < pace.expiry_seconds:
        newest = max(_numbers(store), default=0)
        now = _read(store, newest) if newest else None
        if now is None:
            return
        if newest != number or now != first:
            raise OutputBusy(out=store.uri, holder=str(_parse_holder(now) or "another run"))
        time.sleep(pace.interval_seconds / 4)


def _path(number: int) -> str:
    return f"{LEASE_FOLDER}/{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    found = (re.fullmatch(rf"{re.escape(LEASE_FOLDER)}/(\d+)\.json", path) for path in store.list(LEASE_FOLDER))
    return [int(match[1]) for match in found if match]


def _read(store: Store, number: int) -> bytes | None:
    try:
        return store.read(_path(number))
    except FileNotFoundError:
        return None


def _parse_holder(content: bytes | None) -> Holder | None:
    """The holder that a lease names; None where there is no lease, or a damaged one, which is watched all the same."""
    try:
        return Holder.model_validate_json(content or b"")
    except ValidationError:
        return None


def _this_process(*, job: str, run: str) -> Holder:
    return Holder(
        run=run,
        job=job,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        kernel=_kernel(),
        process_start=_process_start(os.getpid()),
        token=uuid.uuid4().hex,
    )


def _kernel() -> str | None:
    """Boot id and process namespace: containers of one machine share the former and not the latter."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Start of a process in ticks since boot; None where it is unknown or the process is a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in {"Z", "X"} else rest[18]


def _is_gone(holder: Holder) -> bool:
    """Whether a lease was held by a process of this machine that has ended."""
    if holder.kernel is None or holder.kernel != _kernel() or holder.process_start is None:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # A process of another user. Where /proc hides these, its state is unknown, and the lease has to expire.
        return Path(f"/proc/{holder.pid}").exists() and _process_start(holder.pid) != holder.process_start
    return _process_start(holder.pid) != holder.process_start
