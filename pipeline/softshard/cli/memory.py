"""A setting of the whole process: keeping freed memory instead of returning it to the system.

The command line makes it before a run. A library must not make it, and the dataset does not.
"""

from __future__ import annotations

import numpy as np

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Make glibc keep up to 64 MiB of freed memory instead of returning it to the system after each batch.

    Freeing a large block raises glibc's threshold for mapping memory, to at most 32 MiB. Without the page faults of
    new mappings, decoding takes two fifths of the time (measured). With other C libraries it does nothing.
    """
    np.empty(2**25 - 2**16, dtype=np.uint8)
