"""An adapter merged into its model, for an engine that serves whole models alone, and the proof that it is served.

In: a model folder and an adapter. Out: a folder of the adapted model, named by a digest of all that it depends on,
complete once it is there; and a canary, a known text with its log-probabilities under the base and under base and
adapter, both by transformers in float32. The sum of weights and update is rounded once, to the type of the engine.
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
    """A known text and what it is worth to the model with the adapter, and without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: tuple[int, ...]
    base: tuple[float, ...]
    """Log-probability of every token but the first, in nats."""
    adapted: tuple[float, ...]

    def cut(self, num_tokens: int) -> Canary:
        """Its first tokens; what they are worth does not depend on the rest."""
        return Canary(
            token_ids=self.token_ids[:num_tokens],
            base=self.base[: num_tokens - 1],
            adapted=self.adapted[: num_tokens - 1],
        )

    @property
    def sequence(self) -> TokenSequence:
        """The text as a teacher scores it: every token but the first is a label."""
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
    """Folder of the model with the adapter merged into it, beside the adapter, and its canary; made where it is not.

    Needs the model in float32 in the memory of the CPU, and its size in `dtype` on the disk.

    Args:
        model: folder of the base.
        adapter: folder of the adapter.
        identity: digests of both, and the type of the weights.
        vocab_size: logits beyond it are padding.

    Raises:
        PartCorrupt: the folder's canary cannot be read.
    """
    named_by = [identity[what] for what in ("weights", "adapters", "dtype", "transformers", "torch")]
    folder = adapter.parent / ".merged" / canonical_digest([*named_by, vocab_size])[:32]
    if not folder.is_dir():
        # Another worker may have been faster: its folder is the same.
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
    """Compare what an engine says of the canary with what transformers said of it.

    Two things must hold: the engine agrees with the adapted model, and of the way from the base to the adapted model
    it has gone about the whole, which noise cannot do for it where the adapter changes little.

    Args:
        canary: the text and its log-probabilities.
        engine: [labels] log-probabilities by the engine.
        dtype: type that the engine computes in.
        model: name for the error.

    Raises:
        AdapterNotApplied: the engine serves another model, or one that cannot be told from the base.
    """
    base, adapted = np.array(canary.base), np.array(canary.adapted)
    way = adapted - base
    length = float(way @ way)
    share = float((engine - base) @ way) / length if length else 0.0
    difference = float(np.abs(engine - adapted).mean())
    allowed = _ALLOWED_NATS[dtype]
    if not (_LEAST_SHARE < share < _MOST_SHARE and difference <= allowed):
        raise AdapterNotApplied(model=model, share=share, difference=difference, allowed=allowed)
