"""Dask's supervisor of one local worker, for workers that hold gigabytes."""

from __future__ import annotations

import contextlib
from typing import Literal

from distributed import Nanny

__all__ = ["PatientNanny"]


class PatientNanny(Nanny):  # type: ignore[misc]  # distributed has no types here
    """A nanny that closes without an error when the kernel takes longer than Dask's timeout to end its worker.

    Dask kills a worker that does not end in four seconds, and then waits five more. On a busy machine the kernel may
    need longer to free a teacher's memory, and Dask's TimeoutError would fail a run whose results are all written.
    """

    async def close(self, timeout: float = 5, reason: str = "nanny-close") -> Literal["OK"]:
        """As Dask's; the worker has been sent SIGKILL when this returns, and may still be ending."""
        with contextlib.suppress(TimeoutError):
            await super().close(timeout=timeout, reason=reason)
        return "OK"
