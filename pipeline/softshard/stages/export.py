"""Exporting a trained adapter, merged into its base, as a plain Hugging Face folder without softshard or peft.

The job's training must be complete. The folder of model, tokenizer and model card appears whole or not at all. Four
things are checked before it appears, on a known text: the adapter changes the base's distribution; merged in float32,
the logits are those of base and adapter within 1e-4; the folder, loaded again, gives the logits of the weights that
were written; and where these were rounded to the base's type, the model is still nearer to base and adapter than to
the base.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from softshard.errors import (
    AdapterMissing,
    AdapterWithoutEffect,
    FolderTaken,
    MergeDiffers,
    ModelInvalid,
    OutputUnusable,
    PartCorrupt,
)
from softshard.finetune.adapters.kinds import load_adapter, merge_adapter
from softshard.finetune.record import TrainingReceipt, check_files, read_trained
from softshard.models import load_model
from softshard.output.workspace import Model, Workspace, saved_job
from softshard.records.digest import canonical_digest
from softshard.storage import Store, open_store
from softshard.storage.folders import new_folder
from softshard.teacher.merged import CANARY_TEXT

__all__ = ["Exported", "export_model"]

_ALLOWED = 1e-4
"""Largest difference of a logit, in float32."""
_CANARY_TOKENS = 64
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
_OTHER_FILES = ("generation_config.json", "*processor_config.json", "additional_chat_templates/*.jinja")
"""Of models that read images or sound, and templates beside the default one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An exported model, and the measurements before it was written."""

    folder: str
    base: str
    kind: str
    """Kind of the adapter, as in `train.adapter`."""
    adapter: str
    """SHA-256 of the adapter's files and their names, in hex."""
    manifests: tuple[str, ...]
    """Digests of the manifests of the targets."""
    dtype: str
    tied: bool
    """Whether embedding and output layer share one matrix."""
    canary_kl_nats: float
    """Mean KL(base || written) over the positions of a known text: the effect of the adapter that was kept."""
    rounding_kl_nats: float
    """Mean KL(adapted || written) on the same text: the error from the type of the written weights."""
    merge_difference: float
    """Largest difference of a logit between merged and unmerged, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """A merged model in float32, with its measurements on the known text."""

    model: Any
    base: Tensor
    """[T, V] float64 log-probabilities without the adapter."""
    adapted: Tensor
    """[T, V] float64, base and adapter."""
    difference: float

    def divergences_to(self, written: Any, ids: list[int]) -> tuple[float, float]:
        """Mean KL from the base, and from base and adapter, to a model."""
        size = self.base.shape[1]
        logprobs = _logits(written, ids)[:, :size].double().log_softmax(1)
        return _mean_kl(self.base, logprobs), _mean_kl(self.adapted, logprobs)


def export_model(out: str, to: str | Path, *, dtype: Literal["base", "float32"] = "base") -> Exported:
    """Write the job's adapted student to the folder `to`, which must be new or empty.

    Needs the model in float32 in memory, twice.

    Raises:
        FolderTaken: the folder is not empty.
        AdapterMissing: nothing has been trained.
        AdapterNotMergeable, AdapterWithoutEffect, MergeDiffers, ModelInvalid, PartCorrupt: nothing is written.
        OutputUnusable: the folder cannot be written.
    """
    folder = Path(to).absolute()
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise FolderTaken(folder=str(to))
    store = open_store(out)
    workspace = Workspace(job=saved_job(store), out=store)
    student = workspace.student_model
    receipt = _read_receipt(workspace.adapter)
    name = f"{workspace.adapter.uri}/{receipt.folder}"
    merged = _merge(student, workspace.adapter.local_folder(receipt.folder, receipt.files), name=name)
    kind = _read_dtype(student.folder) if dtype == "base" else torch.float32
    # Rounded in place and back at once: the written weights are rounded, the computation is in float32.
    _set_type(merged.model, kind)
    _set_type(merged.model, torch.float32)
    kept, lost = merged.divergences_to(merged.model, _canary_ids(student))
    if not lost < kept:
        raise AdapterWithoutEffect(adapter=name, rounded_to=_dtype_name(kind))
    exported = Exported(
        folder=str(to),
        base=student.name,
        kind=receipt.settings["adapter"],
        adapter=canonical_digest(receipt.files),
        manifests=receipt.manifests,
        dtype=_dtype_name(kind),
        tied=bool(merged.model.config.tie_word_embeddings),
        canary_kl_nats=kept,
        rounding_kl_nats=lost,
        merge_difference=merged.difference,
    )
    try:
        _write(
            student,
            merged.model,
            folder,
            kind=kind,
            card=_model_card(exported, receipt, student, num_weights=merged.model.num_parameters()),
        )
    except OSError as error:
        raise OutputUnusable(uri=str(to), problem=str(error), setting="--to") from error
    return exported


def _read_receipt(store: Store) -> TrainingReceipt:
    """The receipt of the job's adapter, whose files are checked. Raises AdapterMissing, PartCorrupt."""
    trained = read_trained(store)
    if trained is None:
        raise AdapterMissing(uri=f"{store.uri}/adapter.json")
    receipt = trained.adapter
    try:
        check_files(store, receipt.folder, receipt.files)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=f"{store.uri}/{receipt.folder}", problem="lacks a file") from error
    return receipt


def _merge(student: Model, adapter: Path, *, name: str) -> _Merged:
    """The student with the adapter in a folder merged into it. `name` is the adapter's name in errors.

    Raises:
        AdapterWithoutEffect, AdapterNotMergeable, MergeDiffers: the merged model would not be the adapted one.
    """
    ids = _canary_ids(student)
    model = load_model(student.folder, dtype=torch.float32, device="cpu")
    base_logits = _logits(model, ids)
    adapted_model = load_adapter(model, adapter, device="cpu")
    adapted_logits = _logits(adapted_model, ids)
    size = student.tokenizer.vocab_size
    base, adapted = (logits[:, :size].double().log_softmax(1) for logits in (base_logits, adapted_logits))
    if not _mean_kl(base, adapted) > 0 or torch.equal(base_logits, adapted_logits):
        raise AdapterWithoutEffect(adapter=name)
    merged = merge_adapter(adapted_model)
    difference = float((_logits(merged, ids) - adapted_logits).abs().max())
    if not difference <= _ALLOWED:
        raise MergeDiffers(model=name, difference=difference, allowed=_ALLOWED)
    return _Merged(model=merged, base=base, adapted=adapted, difference=difference)


def _canary_ids(student: Model) -> list[int]:
    return student.tokenizer.encode([CANARY_TEXT])[0][:_CANARY_TOKENS]


def _mean_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL(first || second), in nats per position, of log-probabilities [T, V]."""
    return float((first.exp() * (first - second)).sum(1).mean())


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _read_dtype(folder: Path) -> torch.dtype:
    """The data type of the weights in a model folder, from its config; float32 where that names none."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
    return found if isinstance(found, torch.dtype) else getattr(torch, str(found or "float32"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_type(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters in place. Buffers, such as rotary frequencies, are not saved and would lose precision."""
    for item in model.parameters():
        item.data = item.data.to(dtype)


def _write(student: Model, merged: Any, folder: Path, *, kind: torch.dtype, card: str) -> None:
    """Write the model's folder, which appears once it is complete and, loaded again, gives the same logits."""
    _set_type(merged, kind)
    with new_folder(folder, keep_existing=False) as made:
        merged.save_pretrained(made)
        for pattern in (*_TOKENIZER_FILES, *_OTHER_FILES):
            for file in student.folder.glob(pattern):
                copy = made / file.relative_to(student.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        (made / "README.md").write_text(card)
        ids = _canary_ids(student)
        _set_type(merged, torch.float32)
        again = load_model(made, dtype=torch.float32, device="cpu")
        difference = float((_logits(again, ids) - _logits(merged, ids)).abs().max())
        if not difference <= _ALLOWED:
            problem = f"loaded again, its logits differ by {difference:.2g}; it is not kept"
            raise ModelInvalid(model=str(folder), problem=problem)


def _model_card(exported: Exported, receipt: TrainingReceipt, student: Model, *, num_weights: int) -> str:
    """The README.md of the folder: what the model was made of, and by what right."""
    sources = [f"- {each.name}: {each.license}, {each.rights_basis}, style {each.style}" for each in receipt.sources]
    tied = "is tied to the embedding" if exported.tied else "has a matrix of its own"
    header = {
        **({"base_model": student.hub_name} if student.hub_name is not None else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["softshard"],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {student.title.rpartition('/')[2]}, adapted",
        "",
        f"{student.title} with an adapter ({exported.kind}) merged into its weights: {num_weights:,} parameters in",
        f"{exported.dtype}; the output layer {tied}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        f"- Adapter: `{exported.adapter}`",
        *(f"- Manifest of the targets: `{digest}`" for digest in exported.manifests),
        f"- Mean KL(base || this model) on a known text: {exported.canary_kl_nats:.4g} nats per token",
        f"- Mean KL(base and adapter || this model) there: {exported.rounding_kl_nats:.2g} nats per token",
        "",
        "## Text that it was trained on",
        "",
        *sources,
        "",
        "The licence of the base model applies as well.",
    ]
    return "\n".join(lines) + "\n"
