"""softshard: from a corpus of human writing to stored next-token distributions, and to models trained on them.

    documents -> sequences -> teacher pass -> sketches -> parts -> batches -> KL + retention -> adapter -> report
    sources/     corpus/      teacher/        sketch/     shard/   data/      finetune/         finetune/  evaluate/

`stages` runs these steps as the stages of a job, and `cluster` runs their tasks on Dask workers. The command
`softshard` does all of it from a job file. The names below are the public interface for reading targets and training on
them. They are imported on first use: `import softshard` loads neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softshard.config import Job
    from softshard.config.job_file import load_job
    from softshard.data.blend import Blend
    from softshard.data.dataset import SoftLabelDataset
    from softshard.data.filters import RowFilter
    from softshard.data.mix import MixWeights, SoftLabelMix
    from softshard.data.mixing import LabelWeights
    from softshard.data.sparse_targets import SparseTargets
    from softshard.data.target_set import TargetSet
    from softshard.errors import SoftshardError
    from softshard.finetune.adapters.kinds import load_adapter
    from softshard.finetune.loss import dense_kl, sparse_divergence, sparse_kl
    from softshard.finetune.objective import Objective
    from softshard.integrations.axolotl import axolotl_rows
    from softshard.integrations.causal_lm import accept_targets, weight_of_step
    from softshard.integrations.rows import SoftLabelCollator, target_rows
    from softshard.integrations.trainer import SoftLabelTraining
    from softshard.models.decoder import Decoder
    from softshard.shard.manifest import Manifest, read_manifest
    from softshard.shard.read import read_rows
    from softshard.sketch.entries import Entries, entries_of
    from softshard.storage import LocalStore, open_store

__all__ = [
    "Blend",
    "Decoder",
    "Entries",
    "Job",
    "LabelWeights",
    "LocalStore",
    "Manifest",
    "MixWeights",
    "Objective",
    "RowFilter",
    "SoftLabelCollator",
    "SoftLabelDataset",
    "SoftLabelMix",
    "SoftLabelTraining",
    "SoftshardError",
    "SparseTargets",
    "TargetSet",
    "__version__",
    "accept_targets",
    "axolotl_rows",
    "dense_kl",
    "entries_of",
    "load_adapter",
    "load_job",
    "open_store",
    "read_manifest",
    "read_rows",
    "sparse_divergence",
    "sparse_kl",
    "target_rows",
    "weight_of_step",
]

__version__ = "0.1.0"

_HOME = {
    "Blend": "softshard.data.blend",
    "Decoder": "softshard.models.decoder",
    "Entries": "softshard.sketch.entries",
    "Job": "softshard.config",
    "LabelWeights": "softshard.data.mixing",
    "LocalStore": "softshard.storage",
    "Manifest": "softshard.shard.manifest",
    "MixWeights": "softshard.data.mix",
    "Objective": "softshard.finetune.objective",
    "RowFilter": "softshard.data.filters",
    "SoftLabelCollator": "softshard.integrations.rows",
    "SoftLabelDataset": "softshard.data.dataset",
    "SoftLabelMix": "softshard.data.mix",
    "SoftLabelTraining": "softshard.integrations.trainer",
    "SoftshardError": "softshard.errors",
    "SparseTargets": "softshard.data.sparse_targets",
    "TargetSet": "softshard.data.target_set",
    "accept_targets": "softshard.integrations.causal_lm",
    "axolotl_rows": "softshard.integrations.axolotl",
    "dense_kl": "softshard.finetune.loss",
    "entries_of": "softshard.sketch.entries",
    "load_adapter": "softshard.finetune.adapters.kinds",
    "load_job": "softshard.config.job_file",
    "open_store": "softshard.storage",
    "read_manifest": "softshard.shard.manifest",
    "read_rows": "softshard.shard.read",
    "sparse_divergence": "softshard.finetune.loss",
    "sparse_kl": "softshard.finetune.loss",
    "target_rows": "softshard.integrations.rows",
    "weight_of_step": "softshard.integrations.causal_lm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'softshard' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
