"""An adapter merged into its model, for engines that serve whole models only, and a check that it is really served.

In: a model folder and an adapter. Out: a folder with the adapted model, named by a digest of everything that it depends
on and complete as soon as it exists; and a canary: a known text with its log-probabilities under the base model and
under the adapted model, both computed by transformers in float32. The sum of weights and update is rounded once, to the
engine's type.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from softshard.errors import AdapterNotApplied, PartCorrupt
from softshard.finetune.adapters.lora import load_adapter
from softshard.models import load_model, load_tokenizer
from softshard.records.canonical import canonical_json
from softshard.records.digest import canonical_digest
from softshard.sketch.types import TokenSequence
from softshard.storage.folders import new_folder
from softshard.teacher.protocol import TeacherIdentity

__all__ = ["CANARY_TEXT", "Canary", "check_canary", "merged_model"]

_CANARY_FILE = "canary.json"
CANARY_TEXT = (
    "The lamp had burned all night and nobody had noticed. In the morning the wick was a black curl, the glass was"
    " warm, and the letter beside it lay as it had been left: three lines, no name, and a coin to hold it down."
    " Whoever wrote it knew the house. The dog had not barked; the latch, which stuck, had been lifted without a sound."
)
_ALLOWED_NATS = {"float32": 0.01, "bfloat16": 0.25}
"""Mean difference from the float32 forward; vLLM's own in bfloat16 was .027 on a model of 135M."""
_LEAST_SHARE, _MOST_SHARE = 0.5, 1.5


class Canary(BaseModel):
    """A known text with the log-probabilities that transformers gives its tokens with the adapter and without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[int, ...]
    base: tuple[float, ...]
    """Log-probability of every token but the first under the base model, in nats."""
    adapted: tuple[float, ...]
    """The same with the adapter."""

    def cut(self, num_tokens: int) -> Canary:
        """The canary of its first tokens, whose log-probabilities do not depend on the rest."""
        return Canary(
            token_ids=self.token_ids[:num_tokens],
            base=self.base[: num_tokens - 1],
            adapted=self.adapted[: num_tokens - 1],
        )

    @property
    def sequence(self) -> TokenSequence:
        """The text as a sequence to score: every token but the first is a label."""
        ids = np.array(self.token_ids, dtype=np.int32)
        return TokenSequence(
            sequence_id="canary",
            document_id="canary",
            source="",
            style="",
            group="",
            start=0,
            token_ids=ids,
            label_spans=((1, len(ids)),),
        )


def merged_model(model: Path, adapter: Path, *, identity: TeacherIdentity, vocab_size: int) -> tuple[Path, Canary]:
    """Folder with the adapter merged into the model, beside the adapter, and its canary; made if it does not exist.

    Needs CPU memory for the model in float32, and disk space for the model in its `dtype`.

    Args:
        model: folder of the base model.
        adapter: folder of the adapter.
        identity: of the engine: digests of both, and the type of the weights.
        vocab_size: logits beyond it are padding.

    Raises:
        PartCorrupt: the folder's canary cannot be read.
    """
    named_by = [identity[what] for what in ("weights", "adapters", "dtype", "transformers", "torch")]
    folder = adapter.parent / ".merged" / canonical_digest([*named_by, vocab_size])[:32]
    if not folder.is_dir():
        # Another worker may have made the same folder first.
        with new_folder(folder, keep_existing=True) as made:
            _merge(model, adapter, folder=made, dtype=getattr(torch, str(identity["dtype"])), vocab_size=vocab_size)
    try:
        return folder, Canary.model_validate_json((folder / _CANARY_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise PartCorrupt(uri=str(folder / _CANARY_FILE), problem="cannot be read") from error


def _merge(model: Path, adapter: Path, *, folder: Path, dtype: torch.dtype, vocab_size: int) -> None:
    ids = load_tokenizer(model).encode([CANARY_TEXT])[0]
    base = load_model(model, dtype=torch.float32, device="cpu")
    before = _label_logprobs(base, ids, vocab_size)
    adapted = load_adapter(base, adapter, adapter_name="merged", device="cpu")
    after = _label_logprobs(adapted, ids, vocab_size)
    merged: Any = adapted.merge_and_unload()
    merged.to(dtype).save_pretrained(folder)
    for file in model.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    canary = Canary(token_ids=tuple(ids), base=tuple(before), adapted=tuple(after))
    (folder / _CANARY_FILE).write_bytes(canonical_json(canary))


@torch.inference_mode()
def _label_logprobs(model: Any, ids: list[int], vocab_size: int) -> list[float]:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1, :vocab_size].double()
    found = torch.log_softmax(logits, 1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    values: list[float] = found.tolist()
    return values


def check_canary(canary: Canary, engine: NDArray[np.float32], *, dtype: str, model: str) -> None:
    """Compare an engine's log-probabilities of the canary with those of transformers.

    Two conditions must hold. The engine agrees with the adapted model within the noise of its type. And the projection
    of its change from the base model on the adapter's change is between half and one and a half of that change, which
    noise alone cannot produce where the adapter changes little.

    Args:
        canary: the text and its log-probabilities.
        engine: [P] log-probabilities by the engine.
        dtype: type that the engine computes in.
        model: name for the error.

    Raises:
        AdapterNotApplied: the engine serves another model, or one that cannot be told apart from the base model.
    """
    base, adapted = np.array(canary.base), np.array(canary.adapted)
    change = adapted - base
    squared_length = float(change @ change)
    share = float((engine - base) @ change) / squared_length if squared_length else 0.0
    difference = float(np.abs(engine - adapted).mean())
    allowed = _ALLOWED_NATS[dtype]
    if not (_LEAST_SHARE < share < _MOST_SHARE and difference <= allowed):
        raise AdapterNotApplied(model=model, share=share, difference=difference, allowed=allowed)
