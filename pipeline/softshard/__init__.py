"""softshard: a corpus of human writing to stored next-token distributions, and models trained on them.

    documents -> sequences -> teacher pass -> sketches -> Parquet parts -> stream -> KL + retention -> adapter -> report
     corpus/     corpus/      teacher/        target/     shard/           train/    train/            train/  evaluate/
                               +----------- run/ (plan, Dask) ----------+

The command `softshard` does all of it from a job file. For readers of what it leaves, the names below are public and
loaded when they are first used: importing softshard loads neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softshard.config import Job
    from softshard.errors import SoftshardError
    from softshard.jobfile import load_job
    from softshard.shard.manifest import Manifest, read_manifest
    from softshard.shard.read import read_rows
    from softshard.storage import LocalStore, open_store
    from softshard.target.entries import Entries, entries_of
    from softshard.train.columns import SoftLabelCollator, axolotl_rows, target_rows
    from softshard.train.dataset import SoftLabelDataset
    from softshard.train.filters import RowFilter
    from softshard.train.objective import Objective
    from softshard.train.reading import TargetSet
    from softshard.train.student import accept_targets, weight_of_step
    from softshard.train.trainer import SoftLabelTraining

__all__ = [
    "Entries",
    "Job",
    "LocalStore",
    "Manifest",
    "Objective",
    "RowFilter",
    "SoftLabelCollator",
    "SoftLabelDataset",
    "SoftLabelTraining",
    "SoftshardError",
    "TargetSet",
    "__version__",
    "accept_targets",
    "axolotl_rows",
    "entries_of",
    "load_job",
    "open_store",
    "read_manifest",
    "read_rows",
    "target_rows",
    "weight_of_step",
]

__version__ = "0.1.0"

_HOME = {
    "Entries": "softshard.target.entries",
    "Job": "softshard.config",
    "LocalStore": "softshard.storage",
    "Manifest": "softshard.shard.manifest",
    "Objective": "softshard.train.objective",
    "RowFilter": "softshard.train.filters",
    "SoftLabelCollator": "softshard.train.columns",
    "SoftLabelDataset": "softshard.train.dataset",
    "SoftLabelTraining": "softshard.train.trainer",
    "SoftshardError": "softshard.errors",
    "TargetSet": "softshard.train.reading",
    "accept_targets": "softshard.train.student",
    "axolotl_rows": "softshard.train.columns",
    "entries_of": "softshard.target.entries",
    "load_job": "softshard.jobfile",
    "open_store": "softshard.storage",
    "read_manifest": "softshard.shard.manifest",
    "read_rows": "softshard.shard.read",
    "target_rows": "softshard.train.columns",
    "weight_of_step": "softshard.train.student",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'softshard' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
