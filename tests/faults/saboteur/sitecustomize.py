"""Ends a process of softshard by SIGKILL right before a chosen change to its output, from outside softshard's code.

Python imports this module at the start of every process that has its folder on PYTHONPATH. An audit hook sees each file
that is opened for writing, linked, renamed or removed below the folder WATCHED. Orders are empty files
`ORDERS/<number>-<role>-<n>`: the process of that role that comes to its n-th change takes the first order away and is
killed. Every slice of the corpus that a process opens is a line in its file in `ORDERS/opened`.
"""

import os
import signal
import sys

_CHANGES = {"os.link": 1, "os.rename": 1, "os.remove": 0}
"""Audit events, and which of their arguments is the path that changes."""


def _role():
    line = " ".join(sys.orig_argv)
    if "multiprocessing.spawn" in line:
        return "worker"
    return "client" if "softshard" in line else None


class _Saboteur:
    def __init__(self, orders, watched, role):
        self._orders, self._watched, self._role = orders, watched, role
        self._changes, self._busy = 0, False

    def __call__(self, event, arguments):
        if event not in _CHANGES and event != "open":
            return
        if self._busy:
            return
        self._busy = True
        try:
            self._look(event, arguments)
        finally:
            self._busy = False

    def _look(self, event, arguments):
        path = arguments[0 if event == "open" else _CHANGES[event]]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        if event == "open" and "/corpus/sequences/" in str(path):
            with open(f"{self._orders}/opened/{self._role}-{os.getpid()}", "a") as file:
                file.write(f"{path}\n")
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(path).startswith(self._watched):
            self._changes += 1
            self._obey()

    def _obey(self):
        waiting = sorted(name for name in os.listdir(self._orders) if "-" in name)
        if not waiting:
            return
        _, role, change = waiting[0].split("-")
        if role == self._role and int(change) == self._changes:
            try:
                os.unlink(f"{self._orders}/{waiting[0]}")
            except FileNotFoundError:
                return  # another process was faster
            os.kill(os.getpid(), signal.SIGKILL)


if "ORDERS" in os.environ and _role() is not None:
    sys.addaudithook(_Saboteur(os.environ["ORDERS"], os.environ["WATCHED"], _role()))
