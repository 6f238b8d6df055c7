"""A batch's hidden states, from a model that keeps the sequences of a packed row separate.

In: a model's body and the inputs of a batch. Out: its last hidden states. Some bodies mix the sequences of a packed
row: those that ignore `position_ids` (ALiBi, learnt positions as in OPT) or carry a state along the row (convolutions,
state space models). Each body is tested before its first packed batch, and refused if it mixes them.
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
"""Tokens of the two sequences that are packed to test a body."""
_TOLERANCE, _HALF_TOLERANCE = 5e-5, 0.1
"""Largest relative difference of a state. Measured on a CPU in float32: at most 3e-6 for bodies that keep sequences
separate (30 layers), and 1.5e-4 (random weights whose layers add almost nothing) to 1.7 for bodies that mix them. In
half precision the same 30 layers differ by up to .04, because packed and plain attention round in another order, and
bodies that mix by .15 and more."""

_tested: WeakSet[nn.Module] = WeakSet()
"""Bodies that passed the test."""


def hidden_states(decoder: Decoder, batch: Batch) -> Tensor:
    """[N, d] hidden states at the batch's positions, in the order of its labels, before an adapter of the output layer.

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
            if decoder.body not in _tested:
                _test_packing(decoder.body, inputs["cu_seq_lens_q"].device)
        states: Tensor = decoder.body(**inputs).last_hidden_state
        return states


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
def _test_packing(body: Any, device: torch.device) -> None:
    """Compare a sequence that follows another in one row with the same sequence alone.

    No random number is drawn and no cache is kept. Raises ModelInvalid if they differ.
    """
    size = body.config.get_text_config().vocab_size
    first, second = (_sequence(np.array(ids) % size) for ids in (_FIRST, _SECOND))
    with evaluating(body), torch.no_grad():
        row, alone = (
            body(**collate_text(sequences, packing=packing).to(device).model_inputs()).last_hidden_state[0]
            for sequences, packing in (([first, second], True), ([second], False))
        )
    behind = row[len(_FIRST) :]
    difference = (behind.float() - alone.float()).norm(dim=-1) / alone.float().norm(dim=-1)
    # States that are not finite cannot be compared; the training reports them.
    if bool(difference.isfinite().all()) and float(difference.max()) > _tolerance(behind):
        _refuse(body, f"it mixes the sequences of a packed row (states off by {float(difference.max()):.2g})")
    _tested.add(body)


def _refuse(body: Any, problem: str) -> None:
    name = str(body.config.name_or_path) or type(body).__name__
    raise ModelInvalid(model=name, problem=f"{problem}; train it without packing")


def _tolerance(states: Tensor) -> float:
    """The tolerance for the least precise type that products are taken in."""
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
    """Within this context, products of a float32 adapter are taken in the type of a half-precision base.

    Measured on two cores (135M parameters, 10 of 30 layers adapted): forward and backward take .79 s for 1,024 tokens,
    compared with 1.06 s if peft casts each input to float32 and each result back.
    """
    from peft.helpers import disable_input_dtype_casting

    if decoder.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    with torch.autocast(decoder.weight.device.type, decoder.weight.dtype), disable_input_dtype_casting(decoder.body):
        yield
