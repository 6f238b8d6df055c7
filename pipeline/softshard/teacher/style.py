"""The style teacher: the teacher's model adapted to the corpus by LoRA, in K folds.

The adapter of fold k is trained on the documents outside fold k and then scores fold k; the hold-out is scored with the
mean of all adapters. An adapter is a folder that is named by a digest of everything that it depends on and is complete
once it has `receipt.json`. It lists the documents that it was trained on, so that a changed corpus can reuse it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from softshard.config import DataType, LoraSettings, OptimizerSettings
from softshard.data.text import TextBatches
from softshard.finetune.adapters.lora import adapter_digest, save_adapter
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.loop import FineTuned, Step, fine_tune
from softshard.models import load_model, resolve_device, resolve_dtype
from softshard.records.canonical import canonical_json
from softshard.records.digest import canonical_digest, sha256_hex
from softshard.sketch.types import TokenSequence
from softshard.storage import Store
from softshard.teacher.documents import DOCUMENTS_FILE
from softshard.teacher.record import LOG_FILE, AdapterReceipt, adapter_folder

__all__ = ["FoldSpec", "train_fold", "training_precision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSpec:
    """The adapter of a fold before it is trained: everything that can change its weights."""

    fold: int
    documents: tuple[str, ...]
    """For each other fold, in order: SHA-256 of the ids of its documents, as in the corpus manifest."""
    context_tokens: int
    overlap_tokens: int
    model: str
    """Name of the model, as the job gives it."""
    weights: str
    tokenizer_fingerprint: str
    vocab_size: int
    lora: LoraSettings
    optimizer: OptimizerSettings
    dtype: str
    device: str
    num_threads: int
    seed: int

    @property
    def recipe(self) -> str:
        """SHA-256 over everything but the documents."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in {"model", "documents"}}
        values["optimizer"] = self.optimizer.model_dump(exclude={"checkpoint_steps"})
        values["folds"] = len(self.documents) + 1
        return canonical_digest(values)

    @property
    def adapter_id(self) -> str:
        """128 bits, in hex, of a SHA-256 over everything."""
        return canonical_digest([self.recipe, self.documents])[:32]

    @property
    def other_folds(self) -> tuple[int, ...]:
        """Folds whose documents the adapter is trained on."""
        return tuple(fold for fold in range(len(self.documents) + 1) if fold != self.fold)

    @property
    def folder(self) -> str:
        """Folder of the adapter below `teacher/`."""
        return adapter_folder(self.fold, self.adapter_id)


def training_precision(dtype: DataType, *, device: str) -> tuple[str, str]:
    """Names of the type and the kind of device that training uses; both are part of the adapter's id."""
    device = resolve_device(device)
    return str(resolve_dtype(dtype, device=device)).removeprefix("torch."), device.split(":")[0]


def train_fold(
    spec: FoldSpec,
    sequences: Sequence[TokenSequence],
    *,
    documents: bytes,
    folder: Path,
    device: str,
    store: Store,
    on_step: Callable[[Step], None],
) -> AdapterReceipt:
    """Train and save the adapter of a fold; a training that was stopped continues from its last checkpoint.

    Args:
        spec: the adapter to train.
        sequences: all sequences of the documents outside the fold.
        documents: bytes of the list of these documents.
        folder: of the model.
        device: of the spec's kind, with an index where there are several.
        store: of the `teacher/` folder.
        on_step: called after each step.
    """
    import torch

    if spec.device == "cpu":
        torch.set_num_threads(spec.num_threads)
    model = load_model(folder, dtype=getattr(torch, spec.dtype), device=resolve_device(device))
    checkpoint = Checkpoint(store=store, path=f".checkpoints/{spec.folder}.pt")
    batches = TextBatches(sequences, seed=spec.seed, batch_tokens=spec.optimizer.batch_tokens, name=f"fold {spec.fold}")
    tuned = fine_tune(
        model,
        batches,
        lora=spec.lora,
        optimizer=spec.optimizer,
        retention=None,
        seed=spec.seed,
        num_valid=spec.vocab_size,
        chunk_positions=512,
        checkpoint=checkpoint,
        identity=spec.adapter_id,
        on_step=on_step,
    )
    receipt = _save(spec, sequences, tuned, documents=documents, store=store)
    checkpoint.remove()
    return receipt


def _save(
    spec: FoldSpec, sequences: Sequence[TokenSequence], tuned: FineTuned, *, documents: bytes, store: Store
) -> AdapterReceipt:
    weights = save_adapter(tuned.model, base_model=spec.model)
    files = {**weights, DOCUMENTS_FILE: documents}
    for name, content in files.items():
        store.put_once(f"{spec.folder}/{name}", content)
    last = tuned.log[-max(1, len(tuned.log) // 10) :]
    receipt = AdapterReceipt(
        adapter_id=spec.adapter_id,
        fold=spec.fold,
        recipe=spec.recipe,
        files={name: sha256_hex(content) for name, content in files.items()},
        digest=adapter_digest(weights),
        num_sequences=len(sequences),
        num_labels=sum(sequence.num_labels for sequence in sequences),
        final_loss=sum(step.loss for step in last) / len(last),
    )
    log = "".join(json.dumps(asdict(step)) + "\n" for step in tuned.log)
    store.replace(f"{spec.folder}/{LOG_FILE}", log.encode())
    store.put_once(f"{spec.folder}/receipt.json", canonical_json(receipt))
    return receipt
