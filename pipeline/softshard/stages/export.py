"""A trained adapter merged into its base, as a plain Hugging Face folder that needs neither softshard nor peft.

In: the output folder of a job whose training is complete. Out: a folder of model, tokenizer and model card, there whole
or not at all. Four things are proven before it appears, on a known text: the adapter changes the base's distribution;
merged in float32, the logits are those of base and adapter within 1e-4; the folder, loaded anew, gives the logits of
the weights that were written; and where these were rounded to the base's type, the model is still nearer to base and
adapter than to the base.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
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
from softshard.output.workspace import Workspace, saved_job
from softshard.records.digest import canonical_digest
from softshard.storage import open_store
from softshard.storage.folders import new_folder
from softshard.teacher.merged import CANARY_TEXT

__all__ = ["Exported", "export_model"]

_ALLOWED = 1e-4
"""Largest difference of a logit, in float32."""
_CANARY_TOKENS = 64
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An exported model, and what was measured on the way."""

    folder: str
    base: str
    kind: str
    """Of the adapter, as `train.adapter` has it."""
    adapter: str
    """SHA-256 of the adapter's files and their names, in hex."""
    manifests: tuple[str, ...]
    """Digests of the manifests of the targets."""
    dtype: str
    tied: bool
    """Whether embedding and output layer still share one matrix."""
    canary_kl_nats: float
    """Mean KL(base || written) over the positions of a known text: what the written weights have of the adapter."""
    rounding_kl_nats: float
    """Mean KL(adapted || written) there: what the type of the written weights costs."""
    merge_difference: float
    """Largest difference of a logit between merged and unmerged, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """A merged model in float32, and what was measured of it on the known text."""

    model: Any
    base: Tensor
    """[T, V] float64 log-probabilities without the adapter."""
    adapted: Tensor
    """[T, V] float64, base and adapter."""
    difference: float

    def moved(self, written: Any, ids: list[int]) -> tuple[float, float]:
        """Mean KL of the base, and of base and adapter, to a model."""
        size = self.base.shape[1]
        now = _logits(written, ids)[:, :size].double().log_softmax(1)
        return _mean_kl(self.base, now), _mean_kl(self.adapted, now)


def export_model(out: str, to: str | Path, *, dtype: Literal["base", "float32"] = "base") -> Exported:
    """Write the job's adapted student to the folder `to`, which must be new or empty.

    Needs the model in float32 in memory, twice.

    Raises:
        FolderTaken: there is something in the folder.
        AdapterMissing: nothing has been trained.
        AdapterNotMergeable, AdapterWithoutEffect, MergeDiffers, ModelInvalid, PartCorrupt: nothing is written.
        OutputUnusable: the folder cannot be written.
    """
    folder = Path(to).absolute()
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise FolderTaken(folder=str(to))
    store = open_store(out)
    workspace = Workspace(job=saved_job(store), out=store)
    trained = read_trained(workspace.adapter)
    if trained is None:
        raise AdapterMissing(uri=f"{workspace.adapter.uri}/adapter.json")
    receipt = trained.adapter
    try:
        check_files(workspace.adapter, receipt.folder, receipt.files)
    except FileNotFoundError as error:
        raise PartCorrupt(uri=f"{workspace.adapter.uri}/{receipt.folder}", problem="lacks a file") from error
    merged = _merged(workspace, receipt)
    kind = _dtype_of(workspace.student_model.folder) if dtype == "base" else torch.float32
    # In place, and back at once: what is written is rounded, what is computed with is float32.
    _set_type(merged.model, kind)
    _set_type(merged.model, torch.float32)
    left, lost = merged.moved(merged.model, _canary_ids(workspace))
    if not lost < left:
        raise AdapterWithoutEffect(adapter=f"{workspace.adapter.uri}/{receipt.folder}", rounded_to=_name_of(kind))
    exported = Exported(
        folder=str(to),
        base=workspace.student_model.name,
        kind=receipt.settings["adapter"],
        adapter=canonical_digest(receipt.files),
        manifests=receipt.manifests,
        dtype=_name_of(kind),
        tied=bool(merged.model.config.tie_word_embeddings),
        canary_kl_nats=left,
        rounding_kl_nats=lost,
        merge_difference=merged.difference,
    )
    try:
        _write(workspace, merged.model, folder, kind=kind, card=_model_card(exported, receipt))
    except OSError as error:
        raise OutputUnusable(uri=str(to), problem=str(error), setting="--to") from error
    return exported


def _merged(workspace: Workspace, receipt: TrainingReceipt) -> _Merged:
    """Raises AdapterWithoutEffect, MergeDiffers, and what cannot be loaded or merged."""
    student = workspace.student_model
    ids = _canary_ids(workspace)
    model = load_model(student.folder, dtype=torch.float32, device="cpu")
    base = _logits(model, ids)
    folder = workspace.adapter.local_folder(receipt.folder, receipt.files)
    adapted_model = load_adapter(model, folder, device="cpu")
    adapted = _logits(adapted_model, ids)
    size = student.tokenizer.vocab_size
    before, after = (one[:, :size].double().log_softmax(1) for one in (base, adapted))
    name = f"{workspace.adapter.uri}/{receipt.folder}"
    if not _mean_kl(before, after) > 0 or torch.equal(base, adapted):
        raise AdapterWithoutEffect(adapter=name)
    merged = merge_adapter(adapted_model)
    difference = float((_logits(merged, ids) - adapted).abs().max())
    if not difference <= _ALLOWED:
        raise MergeDiffers(model=name, difference=difference, allowed=_ALLOWED)
    return _Merged(model=merged, base=before, adapted=after, difference=difference)


def _canary_ids(workspace: Workspace) -> list[int]:
    return workspace.student_model.tokenizer.encode([CANARY_TEXT])[0][:_CANARY_TOKENS]


def _mean_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL(first || second), nats a position, of log-probabilities [T, V]."""
    return float((first.exp() * (first - second)).sum(1).mean())


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _dtype_of(folder: Path) -> torch.dtype:
    """The type of a model folder's weights, by its config; float32 where that does not say."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).dtype
    return found if isinstance(found, torch.dtype) else getattr(torch, str(found or "float32"))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_type(model: Any, dtype: torch.dtype) -> None:
    """Give the weights another type; buffers, such as the frequencies of positions, are not saved and would suffer."""
    for item in model.parameters():
        item.data = item.data.to(dtype)


def _write(workspace: Workspace, merged: Any, folder: Path, *, kind: torch.dtype, card: str) -> None:
    """Put the model's folder in its place, once it is complete and gives, loaded anew, what was written."""
    _set_type(merged, kind)
    student = workspace.student_model
    with new_folder(folder, keep_existing=False) as made:
        merged.save_pretrained(made)
        for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
            for file in student.folder.glob(pattern):
                shutil.copyfile(file, made / file.name)
        (made / "README.md").write_text(card)
        ids = _canary_ids(workspace)
        _set_type(merged, torch.float32)
        again = load_model(made, dtype=torch.float32, device="cpu")
        difference = float((_logits(again, ids) - _logits(merged, ids)).abs().max())
        if not difference <= _ALLOWED:
            problem = f"loaded anew, its logits are off by {difference:.2g}; it is not kept"
            raise ModelInvalid(model=str(folder), problem=problem)


def _model_card(exported: Exported, receipt: TrainingReceipt) -> str:
    """README.md of the folder: what it was made of, and by what right."""
    sources = [f"- {one.name}: {one.license}, {one.rights_basis}, style {one.style}" for one in receipt.sources]
    tied = "is tied to the embedding" if exported.tied else "has a matrix of its own"
    lines = [
        "---",
        f"base_model: {exported.base}",
        "library_name: transformers",
        "tags:",
        "- softshard",
        "---",
        "",
        f"# {Path(exported.base).name}, adapted",
        "",
        f"`{exported.base}` with an adapter ({exported.kind}) merged into its weights ({exported.dtype}); the output",
        f"layer {tied}.",
        "",
        f"- Adapter: `{exported.adapter}`",
        *(f"- Manifest of the targets: `{digest}`" for digest in exported.manifests),
        f"- Mean KL(base || this model) on a known text: {exported.canary_kl_nats:.4g} nats a token",
        f"- Mean KL(base and adapter || this model) there: {exported.rounding_kl_nats:.2g} nats a token",
        "",
        "## Text that it was trained on",
        "",
        *sources,
        "",
        "The base's own licence holds beside these.",
    ]
    return "\n".join(lines) + "\n"
