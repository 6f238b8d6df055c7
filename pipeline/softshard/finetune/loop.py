"""Batches to an adapter: the training steps.

In: a frozen model, batches of targets, settings. Out: the model with a trained adapter, and a log of its steps. A
training that is stopped after any step and resumed from its checkpoint ends with the same bits as one that was not
stopped, on the same CPU with the same number of threads; on a GPU sums may differ in their last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softshard.config import AdapterKind, LoraSettings, OptimizerSettings
from softshard.data.text import BatchSource, endless
from softshard.errors import TrainingDiverged
from softshard.finetune.adapters.kinds import attach_adapter
from softshard.finetune.adapters.output import OutputAdapted
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.finetune.retention import Retention
from softshard.models.decoder import Decoder
from softshard.records.digest import canonical_digest
from softshard.records.seeds import keyed_seed

if TYPE_CHECKING:
    from peft import PeftModel

    from softshard.data.batch import Batch

__all__ = ["FineTuned", "Step", "fine_tune", "learning_rate_at", "num_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One finished step. Losses are in nats, means over labels, measured before the update."""

    step: int
    """From 1."""
    total_steps: int
    learning_rate: float
    loss: float
    """The objective's: by default cross-entropy to the target, which is the KL plus the target's own entropy."""
    retention_loss: float | None
    """Not multiplied by its weight; None without retention."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the batch, without padding and retention."""
    epoch: int
    """From 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuned:
    """A finished training."""

    model: PeftModel | OutputAdapted
    """In evaluation mode; its `unload()` is the base model again."""
    log: tuple[Step, ...]
    """All steps, including those before an interruption."""


def _ignore(step: Step) -> None:
    return None


def fine_tune(
    model: Any,
    batches: BatchSource,
    *,
    lora: LoraSettings,
    optimizer: OptimizerSettings,
    retention: Retention | None,
    seed: int,
    num_valid: int,
    chunk_positions: int,
    checkpoint: Checkpoint | None,
    identity: str,
    objective: Objective = CROSS_ENTROPY,
    adapter: AdapterKind = "lora",
    on_step: Callable[[Step], None] = _ignore,
) -> FineTuned:
    """Train a new adapter on a frozen model, in place.

    The number of steps is `num_steps`. With `checkpoint`, the state is written every `optimizer.checkpoint_steps`
    steps, at the end, and when KeyboardInterrupt or SystemExit stops the training. A checkpoint of the same `identity`,
    settings and data is resumed, any other is ignored; the current position of the streams does not matter for that.
    The caller removes the checkpoint once the adapter is saved.

    Args:
        model: causal language model without an adapter, on its device; its own dropout stays off.
        batches: one per step; a new training starts at their current position.
        seed: for the adapter's initial weights and its dropout.
        num_valid: vocabulary of the data.
        identity: identifies what the other arguments do not, above all the base model's weights.
        lora, adapter: shape and kind of the adapter.
        objective: how the model is compared with the targets.
        on_step: called after each complete step.

    Raises:
        ModelInvalid: the loss would be wrong for this model, or a module to adapt is missing.
        TrainingDiverged: a loss or gradient is not finite.
        StorageFull: there is no space for the checkpoint.
    """
    total_steps = num_steps(batches, optimizer=optimizer)
    retention = retention if retention is not None and retention.weight > 0 else None
    # A model that cannot be trained is refused here, before the adapter changes it.
    Decoder.of(model.eval())
    settings: list[Any] = [adapter, lora, optimizer.model_dump(exclude={"checkpoint_steps"}), asdict(objective), seed]
    settings += [num_valid, chunk_positions, total_steps, _named(batches), _kept(retention)]
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(keyed_seed("softshard.dropout", seed))
        adapted = attach_adapter(model, adapter, lora, seed=seed)
        training = _Training(
            model=adapted,
            batches=batches,
            settings=optimizer,
            retention=retention,
            objective=objective,
            num_valid=num_valid,
            chunk_positions=chunk_positions,
            total_steps=total_steps,
            checkpoint=checkpoint,
            identity=canonical_digest([identity, settings]),
        )
        training.run(on_step)
    adapted.eval()
    return FineTuned(model=adapted, log=tuple(training.log))


def num_steps(batches: BatchSource, *, optimizer: OptimizerSettings) -> int:
    """Steps of a training: epochs times the batches of epoch 0, rounded; at least 1."""
    return max(1, round(optimizer.epochs * batches.batches_per_epoch(0)))


def _named(batches: BatchSource) -> list[Any]:
    """What a stream holds and in which order, without its position, which an earlier call may have advanced."""
    return [batches.digest, batches.order]


def _kept(retention: Retention | None) -> list[Any] | None:
    return None if retention is None else [retention.weight, retention.objective, _named(retention.batches)]


def learning_rate_at(step: int, *, total_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of a step, counted from 1: linear warm-up to the highest, then a cosine down to a tenth of it."""
    warmup = round(settings.warmup_fraction * total_steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / (total_steps - warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class _Training:
    """A training between two steps: everything that a checkpoint holds, and how to take the next step."""

    def __init__(
        self,
        *,
        model: PeftModel | OutputAdapted,
        batches: BatchSource,
        settings: OptimizerSettings,
        retention: Retention | None,
        objective: Objective,
        num_valid: int,
        chunk_positions: int,
        total_steps: int,
        checkpoint: Checkpoint | None,
        identity: str,
    ) -> None:
        self._model, self._decoder = model, Decoder.of(model.eval())
        _only_adapter_drops(model)
        self._batches, self._retention, self._settings = batches, retention, settings
        self._objective = objective
        self._num_valid, self._chunk_positions, self._total_steps = num_valid, chunk_positions, total_steps
        self._checkpoint, self._identity = checkpoint, identity
        self._adapter = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._adapter.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._cuda = _cuda_devices(model)
        self._sources = [batches, *([] if retention is None else [retention.batches])]
        self._position = self._read_position()
        self._updating = False
        self.log: list[Step] = []

    def run(self, on_step: Callable[[Step], None]) -> None:
        """Resume from the checkpoint, if there is one of this training, and take the remaining steps."""
        if self._checkpoint is not None and (saved := self._checkpoint.read(identity=self._identity)):
            self._restore(saved)
        streams = [endless(source) for source in self._sources]
        try:
            while len(self.log) < self._total_steps:
                batches = [next(stream).to(self._decoder.weight.device) for stream in streams]
                self._step(batches)
                on_step(self.log[-1])
                if len(self.log) % self._settings.checkpoint_steps == 0 or len(self.log) == self._total_steps:
                    self._save()
        except (KeyboardInterrupt, SystemExit):
            # During an update some weights are a step ahead of others: then the last checkpoint is kept.
            if not self._updating:
                self._save()
            raise

    def _step(self, batches: list[Batch]) -> None:
        number = len(self.log) + 1
        rate = learning_rate_at(number, total_steps=self._total_steps, settings=self._settings)
        self._optimizer.zero_grad()
        sizes = {"num_valid": self._num_valid, "chunk_positions": self._chunk_positions}
        loss = self._objective.loss(self._decoder, batches[0], **sizes)
        torch.autograd.backward(loss)
        kept = None
        if self._retention is not None:
            kept = self._retention.loss(self._model, self._decoder, batches[1], **sizes)
            torch.autograd.backward(self._retention.weight * kept)
        norm = nn.utils.clip_grad_norm_(self._adapter.values(), self._settings.max_grad_norm)
        values = loss.item(), None if kept is None else kept.item(), norm.item()
        if not all(math.isfinite(value) for value in values if value is not None):
            raise TrainingDiverged(step=number, loss=values[0])
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._updating = True
        self._optimizer.step()
        # The position before a batch has its epoch; the one after an epoch's last batch is in the next epoch.
        epoch = self._position["streams"][0]["epoch"]
        self._position = self._read_position()
        self.log.append(
            Step(
                step=number,
                total_steps=self._total_steps,
                learning_rate=rate,
                loss=values[0],
                retention_loss=values[1],
                grad_norm=values[2],
                tokens=batches[0].num_tokens,
                epoch=epoch,
            )
        )
        self._updating = False

    def _read_position(self) -> dict[str, Any]:
        """State of streams and random numbers. An interrupted step advances them without changing the weights, so a
        checkpoint uses those of the last complete step."""
        return {
            "streams": [source.state_dict() for source in self._sources],
            "random": torch.get_rng_state(),
            "random_cuda": [torch.cuda.get_rng_state(device) for device in self._cuda],
        }

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        state = {
            **self._position,
            "adapter": {name: item.detach() for name, item in self._adapter.items()},
            "optimizer": self._optimizer.state_dict(),
            "log": [asdict(step) for step in self.log],
        }
        self._checkpoint.write(state, identity=self._identity)

    def _restore(self, saved: dict[str, Any]) -> None:
        for source, state in zip(self._sources, saved["streams"], strict=True):
            source.load_state_dict(state)
        with torch.no_grad():
            for name, item in self._adapter.items():
                item.copy_(saved["adapter"][name])
        self._optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        for device, state in zip(self._cuda, saved["random_cuda"], strict=True):
            torch.cuda.set_rng_state(state, device)
        self._position = {name: saved[name] for name in self._position}
        self.log = [Step(**step) for step in saved["log"]]


def _only_adapter_drops(model: PeftModel | OutputAdapted) -> None:
    """Evaluation mode except for the adapter's dropout: the base's own dropout would add noise to the loss."""
    model.eval()
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("lora_dropout", "adapter_dropout"):
            module.train()


def _cuda_devices(model: Any) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
