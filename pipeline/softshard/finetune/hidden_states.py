"""A batch's hidden states, from a model that keeps the sequences of a packed row apart.

In: a model's body and the inputs of a batch. Out: its last hidden states. A packed row is no answer to a body that
mixes its sequences, as one does that reads no `position_ids` (ALiBi, learnt positions of OPT's kind) or that carries a
state along the row (convolutions, state spaces): when a body first meets one it is tried out, and refused if it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from softshard.data.batch import Batch, collate_text
from softshard.errors import ModelInvalid
from softshard.models.decoder import Decoder, evaluating
from softshard.sketch.types import TokenSequence

__all__ = ["hidden_states", "last_states", "mixed_precision"]

_FIRST, _SECOND = range(1, 8), range(8, 13)
"""Tokens of the two sequences that are packed to try a body out."""
_TOLERANCE, _HALF_TOLERANCE = 5e-5, 0.1
"""Share of a state's length. Measured on a CPU in float32: bodies that keep apart are off by at most 3e-6 (30 layers),
those that mix by 1.5e-4 (random weights whose layers add next to nothing) to 1.7. In half precision the same 30 layers
are off by up to .04, for packed and plain attention round in another order; those that mix by .15 and more."""

_apart: WeakSet[nn.Module] = WeakSet()
"""Bodies that were tried out."""


def hidden_states(decoder: Decoder, batch: Batch) -> Tensor:
    """[N, d] hidden states at the batch's positions, in the order of its labels, before any adapter of the output.

    Raises:
        ModelInvalid: as `last_states`.
    """
    chosen: Tensor = last_states(decoder, batch.model_inputs()).flatten(0, 1)[batch.positions]
    return chosen


def last_states(decoder: Decoder, inputs: Mapping[str, Any]) -> Tensor:
    """[B, L, d] last hidden states for a batch's `model_inputs()`.

    Raises:
        ModelInvalid: the batch is packed, and the body mixes the sequences of a row.
    """
    with mixed_precision(decoder):
        if inputs.get("cu_seq_lens_q") is not None:
            if inputs.get("past_key_values") is not None:
                _refuse(decoder.body, "with a prefix it mixes the sequences of a packed row")
            if decoder.body not in _apart:
                _try_out(decoder.body, inputs["cu_seq_lens_q"].device)
        states: Tensor = decoder.body(**inputs).last_hidden_state
        return states


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
def _try_out(body: Any, device: torch.device) -> None:
    """Compare a sequence behind another in one row with the same alone; no random number is drawn, no cache kept."""
    size = body.config.get_text_config().vocab_size
    first, second = (_sequence(np.array(ids) % size) for ids in (_FIRST, _SECOND))
    with evaluating(body), torch.no_grad():
        row, alone = (
            body(**collate_text(sequences, packing=packing).to(device).model_inputs()).last_hidden_state[0]
            for sequences, packing in (([first, second], True), ([second], False))
        )
    behind = row[len(_FIRST) :]
    difference = (behind.float() - alone.float()).norm(dim=-1) / alone.float().norm(dim=-1)
    # States that are not finite leave nothing to compare: those are found by whoever trains with them.
    if bool(difference.isfinite().all()) and float(difference.max()) > _tolerance(behind):
        _refuse(body, f"it mixes the sequences of a packed row (states off by {float(difference.max()):.2g})")
    _apart.add(body)


def _refuse(body: Any, problem: str) -> None:
    name = str(body.config.name_or_path) or type(body).__name__
    raise ModelInvalid(model=name, problem=f"{problem}; train it without packing")


def _tolerance(states: Tensor) -> float:
    """By the least precise type that products are taken in."""
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    rounded = kind == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return _HALF_TOLERANCE if rounded or dtype in (torch.bfloat16, torch.float16) else _TOLERANCE


def _sequence(token_ids: Any) -> TokenSequence:
    return TokenSequence(
        sequence_id="",
        document_id="",
        source="",
        style="",
        group="",
        start=0,
        token_ids=token_ids.astype(np.int32),
        label_spans=((1, len(token_ids)),),
    )


@contextlib.contextmanager
def mixed_precision(decoder: Decoder) -> Iterator[None]:
    """Products of a float32 adapter in the type of a half-precision base.

    Measured on two cores (135M parameters, 10 of 30 layers adapted): forward and backward take .79 s for 1,024
    tokens so, and 1.06 s where peft casts each input to float32 and each result back.
    """
    from peft.helpers import disable_input_dtype_casting

    if decoder.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    with torch.autocast(decoder.weight.device.type, decoder.weight.dtype), disable_input_dtype_casting(decoder.body):
        yield
