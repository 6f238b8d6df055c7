"""A causal language model whose own forward returns the loss of a batch's targets: `accept_targets`.

In: a model of transformers, with adapters or without. Out: the same model, which works as before and, if called with
`Batch.features()`, returns the loss without building the logits of all positions. The output layer is called once, as a
module, so that wrappers of modules work: DDP, FSDP of either kind, accelerate, Trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softshard.data.sparse_targets import SparseTargets
from softshard.errors import ModelInvalid, VocabularyMismatch
from softshard.finetune.hidden_states import last_states
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.models.decoder import Decoder, LogitTransform, evaluating
from softshard.models.output_layer import model_name, output_parts, without_wrapper

__all__ = ["accept_targets", "mean_weights", "weight_of_step"]


def accept_targets(
    model: Any, *, vocab_size: int, objective: Objective = CROSS_ENTROPY, chunk_positions: int = 512
) -> None:
    """Let a model's forward accept the features of a batch and return the loss; other calls are unchanged.

    `model(**batch.features()).loss` is the mean over the batch's labels by their weights. With `num_items_in_batch`, it
    is the sum divided by that: see `weight_of_step`. The other outputs, including `logits`, are None. A second call
    with the same settings changes nothing.

    Args:
        model: causal language model, or a `PeftModel` of one; not yet sharded, nor on the meta device.
        vocab_size: vocabulary of the data, `SoftLabelDataset.metadata.vocab_size`; further logits are padding.
        objective: how the model is compared with targets; by default cross-entropy, whose gradient is the KL's.
        chunk_positions: positions whose logits exist at one time.

    Raises:
        ModelInvalid: the loss would be wrong for this model. Whether it is for packed batches is tested at the first
            one.
        VocabularyMismatch: the model has logits for fewer tokens.
        ValueError: the model accepts targets already, with other settings.
    """
    inner = without_wrapper(model)
    name = model_name(inner)
    settings = objective, vocab_size, chunk_positions
    if isinstance(accepted := inner.forward, _Forward):
        if accepted.settings != settings:
            raise ValueError(f"{name}: accepts targets already, with {accepted.settings}, and not {settings}")
        return
    if (problem := _problem_with(model, inner)) is not None:
        raise ModelInvalid(model=name, problem=problem)
    with evaluating(model):
        decoder = Decoder.of(model)
    if decoder.output_size < vocab_size:
        raise VocabularyMismatch(data="targets", data_size=vocab_size, model=name, model_size=decoder.output_size)
    inner.forward = _Forward(inner, inner.forward, settings, decoder.transform)
    inner.forward.output_layer()


def _problem_with(model: Any, inner: Any) -> str | None:
    """Why the loss would be wrong or incomplete for a model; None if it is right."""
    prompt = getattr(model, "active_peft_config", None)
    if prompt is not None and prompt.is_prompt_learning and prompt.peft_type != "PREFIX_TUNING":
        kind = str(prompt.peft_type.value)
        return f"{kind} puts virtual tokens before the text, and targets would be compared at other positions"
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        return "its loss on routers would be left out; load it with `output_router_logits=False`"
    return None


def weight_of_step(*batches: Mapping[str, Any]) -> Tensor:
    """The divisor that makes the loss of a step the mean over the labels of the global batch, by their weights.

    It is the sum of the weights of these batches' labels over all ranks, or 1 if that is 0; every rank must call this
    function. Pass it as `num_items_in_batch`, and multiply the loss by the number of ranks if gradients are averaged
    over ranks, as DDP and FSDP do.

    Args:
        batches: features of this rank's batches of the step, one for each accumulation step.
    """
    weight = torch.stack([mean_weights(batch).sum() for batch in batches]).sum()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(weight)
    return torch.where(weight > 0, weight, 1.0)


def mean_weights(features: Mapping[str, Any]) -> Tensor:
    """[N] weights by which the mean over a batch's labels is taken, as `SparseTargets.mean_weights`, from features."""
    weights: Tensor = features["counted" if "counted" in features else "position_weights"]
    return weights


class _Forward:
    """A model's forward. It is an object and not a closure, so that a copy of the model gets its own."""

    def __init__(
        self,
        model: Any,
        original: Callable[..., Any],
        settings: tuple[Objective, int, int],
        transform: LogitTransform,
    ) -> None:
        functools.update_wrapper(self, original)
        self._model, self._original, self._transform = model, original, transform
        self.settings = settings
        """Objective, vocabulary and positions of a chunk that the model accepts targets with."""

    def output_layer(self) -> Any:
        """The model's output layer, which accepts targets; one that has been wrapped or replaced since is made to."""
        layer = self._model.get_output_embeddings()
        if not isinstance(layer.forward, _OutputForward):
            name = model_name(self._model)
            output_parts(layer, model=name)
            layer.forward = _OutputForward(layer, layer.forward, name, self._transform, *self.settings)
        return layer

    def __call__(self, *args: Any, **given: Any) -> Any:
        if "entry_ids" not in given:
            return self._original(*args, **given)
        from transformers.modeling_outputs import CausalLMOutput

        targets = SparseTargets.from_tensors(given)
        positions, num_items = given.pop("positions"), given.pop("num_items_in_batch", None)
        if given.get("input_ids") is None:
            raise ValueError("targets need `input_ids`, which an adapter has replaced by embeddings")
        own = targets.tensors()
        inputs = {name: item for name, item in given.items() if item is not None and name not in own}
        inputs["use_cache"] = False
        layer = self.output_layer()
        states = last_states(Decoder(body=self._model.get_decoder(), weight=layer.weight, bias=None), inputs)
        return CausalLMOutput(loss=layer(states.flatten(0, 1)[positions], targets=targets, num_items=num_items))


@dataclass(slots=True)
class _OutputForward:
    """An output layer's forward. A wrapper that shards the layer has gathered it while this runs."""

    layer: Any
    original: Callable[..., Any]
    model: str
    transform: LogitTransform
    objective: Objective
    vocab_size: int
    chunk_positions: int

    def __call__(
        self,
        hidden: Tensor,
        *args: Any,
        targets: SparseTargets | None = None,
        num_items: Tensor | float | None = None,
        **given: Any,
    ) -> Tensor:
        if targets is None:
            logits: Tensor = self.original(hidden, *args, **given)
            return logits
        if (kind := targets.position_weights.dtype) not in (torch.float32, torch.float64):
            raise ValueError(
                f"position_weights are {kind}, they must be float32: do not cast targets to a lower precision"
                " (FSDP: `MixedPrecisionPolicy(cast_forward_inputs=False)`)"
            )
        weight, bias, adapter = output_parts(self.layer, model=self.model)
        decoder = Decoder(body=self.layer, weight=weight, bias=bias, transform=self.transform, output=adapter)
        states, low_rank = decoder.adapted(hidden)
        return self.objective.loss_from_states(
            states,
            decoder,
            targets,
            low_rank=low_rank,
            num_valid=self.vocab_size,
            chunk_positions=self.chunk_positions,
            num_items_in_batch=num_items,
        )
