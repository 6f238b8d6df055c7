"""Training from targets with Trainer of transformers, and its descendants such as TRL's SFTTrainer.

In: a `SoftLabelDataset`, whose batches are dealt to ranks already, or rows of a map-style data set with a
`SoftLabelCollator`, which Trainer deals. Out: Trainer's own steps, checkpoints and logs, the loss being the mean over
labels by their weights over accumulation and ranks, and in evaluation over all batches and ranks. A stream goes on from
a checkpoint after the batch that was trained last, on any number of processes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from softshard.data.dataset import SoftLabelDataset
from softshard.data.mix import SoftLabelMix
from softshard.data.sharding import ShardedBatches
from softshard.data.text import StreamState
from softshard.errors import ResumeMismatch
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.integrations.causal_lm import accept_targets, mean_weights, weight_of_step
from softshard.models import check_tokenizer, wrap_tokenizer

__all__ = ["SoftLabelTraining"]

_PLACE = "softshard.json"
"""In a checkpoint: how far the data was trained on, its digest, and the epoch that the training began in."""


class SoftLabelTraining:
    """Put it before a Trainer: `class SoftLabelTrainer(SoftLabelTraining, Trainer): ...`.

    Columns of rows are kept (`remove_unused_columns`). For a stream, `max_steps` is set by `train` where it is not
    given, so that the last step ends with the last of `num_train_epochs` epochs; the batch size of the arguments is not
    looked at, and loaders are not given to accelerate; Trainer counts all of the training as one epoch.

    Args:
        vocab_size, objective, chunk_positions: as in `accept_targets`.

    Raises:
        ValueError: an argument would have no effect, or another than it says; a stream is to be evaluated on, which
            goes on from pass to pass, so give rows; it is dealt to another number of processes than there are; or the
            objective's temperature is not that of its targets.
        TokenizerMismatch: the `processing_class` is not the tokenizer of the stream.
        ModelInvalid, VocabularyMismatch: as in `accept_targets`.
    """

    args: Any
    model: Any
    model_init: Any
    accelerator: Any
    processing_class: Any
    compute_loss_func: Any
    train_dataset: Any
    eval_dataset: Any
    add_callback: Any
    compute_loss_context_manager: Any
    _prepare_inputs: Any

    def __init__(
        self,
        *args: Any,
        vocab_size: int,
        objective: Objective = CROSS_ENTROPY,
        chunk_positions: int = 512,
        **kwargs: Any,
    ) -> None:
        self._accept = functools.partial(
            accept_targets, vocab_size=vocab_size, objective=objective, chunk_positions=chunk_positions
        )
        super().__init__(*args, **kwargs)
        _refuse_overridden(self)
        if self.model_init is None:
            self._accept(self.model)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.args.remove_unused_columns = False
        self._stream: _Stream | None = None
        self._batches_left: int | None = None
        self._measured = [0.0, 0.0]
        if isinstance(data := self.train_dataset, ShardedBatches):
            _check_stream(self, data, objective)
            self.args.ignore_data_skip = True  # the data is set to its place, and need not be read up to it
            self._epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else None
            self._first_epoch = 0
            self.add_callback(_KeepPlace(self))

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """A new model, which takes targets."""
        parent: Any = super()
        model = parent.call_model_init(*args, **kwargs)
        self._accept(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's. Raises ResumeMismatch for a checkpoint of other data, or of another order of it."""
        parent: Any = super()
        if isinstance(self.train_dataset, ShardedBatches):
            folder: Any = resume_from_checkpoint
            if resume_from_checkpoint is True:
                folder = get_last_checkpoint(self.args.output_dir)
            self._take_up(Path(folder) if folder else None)
        return parent.train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _take_up(self, checkpoint: Path | None) -> None:
        """Set the stream to its place, and `max_steps` to the steps that were taken and those that are left."""
        data, taken = self.train_dataset, 0
        if checkpoint is None:
            if self._stream is not None:  # an earlier training, whose workers alone have moved
                data.load_state_dict(self._stream.place)
            self._first_epoch = data.state_dict()["epoch"]
        else:
            saved = json.loads((checkpoint / _PLACE).read_text())
            data.load_state_dict(saved["stream"])
            if saved["digest"] != data.digest:
                raise ResumeMismatch(saved=saved["digest"], current=data.digest, what="content")
            self._first_epoch = saved["first_epoch"]
            taken = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        if self._epochs is not None:
            self._batches_left = data.batches_until(self._first_epoch + self._epochs)
            self.args.max_steps = taken + math.ceil(self._batches_left / self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> Any:
        """Of a stream, a loader over all epochs that nothing deals again; else Trainer's own."""
        parent: Any = super()
        if not isinstance(self.train_dataset, ShardedBatches):
            return parent.get_train_dataloader()
        workers = self.args.dataloader_num_workers
        self._stream = _Stream(
            self.train_dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=workers > 0,
        )
        self._stream.place = self.train_dataset.state_dict()
        self._stream.num_left = self._batches_left
        return self._stream

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Batches of a step, and the weight of their labels over all processes, which need not be a whole number."""
        parent: Any = super()
        batches, _ = parent.get_batch_samples(epoch_iterator, num_batches, device)
        moved = [{"position_weights": mean_weights(batch).to(device)} for batch in batches]
        return batches, weight_of_step(*moved) if moved else None

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """A batch's share of the step's mean, times the number of processes, whose gradients are averaged.

        Where there is no step, as in evaluation, the mean of the batch.
        """
        training = model.training
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch if training else None)
        loss = outputs.loss * self.accelerator.num_processes if training else outputs.loss
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's, whose mean over batches becomes the mean over labels by their weights."""
        parent: Any = super()
        self._measured = [0.0, 0.0]
        output = parent.evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = torch.tensor(self._measured, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            measured = self.accelerator.reduce(measured.to(self.args.device))
        loss, weight = measured.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / weight if weight > 0 else 0.0
        return output

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The mean of a batch; there are no logits. Rows with which accelerate fills the last batch do not count."""
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**inputs, num_items_in_batch=1.0).loss
        weight = mean_weights(inputs).sum()
        self._measured = [self._measured[0] + float(total), self._measured[1] + float(weight)]
        return total / torch.where(weight > 0, weight, 1.0), None, None

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """In the last batch of a loader, whose first rows of all processes' are not repeated: others without weight."""
        dealt = self.accelerator.gradient_state
        if not dealt.end_of_dataloader or dealt.remainder <= 0:
            return inputs
        if (starts := inputs.get("cu_seq_lens_q")) is not None:
            row = torch.searchsorted(starts[1:].long(), inputs["positions"], right=True)
            num_rows = len(starts) - 1
        else:
            num_rows, length = inputs["input_ids"].shape
            row = inputs["positions"] // length
        counts = row + self.accelerator.process_index * num_rows < dealt.remainder
        weights: dict[str, Any] = {
            name: inputs[name] * counts for name in ("position_weights", "counted") if name in inputs
        }
        return {**inputs, **weights}


def _refuse_overridden(trainer: SoftLabelTraining) -> None:
    """Refuse what the loss on targets takes the place of, and evaluation on a stream. Raises ValueError."""
    arguments = trainer.args
    if arguments.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={arguments.label_smoothing_factor} has no effect on targets; give 0")
    if getattr(arguments, "loss_type", "nll") != "nll":
        raise ValueError(f"loss_type={arguments.loss_type!r} has no effect on targets; give `objective` instead")
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func has no effect on targets; give `objective` instead")
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    if any(isinstance(data, ShardedBatches) for data in held_out.values()):
        raise ValueError("eval_dataset is a stream; give rows of `target_rows` and a SoftLabelCollator")


def _check_stream(trainer: SoftLabelTraining, data: ShardedBatches, objective: Objective) -> None:
    """Refuse a stream that is not what the trainer takes it for. Raises ValueError, TokenizerMismatch."""
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(trainer.args, name) == "epoch":
            raise ValueError(f'{name}="epoch": Trainer counts all epochs of a stream as one; give "steps"')
    processes = trainer.accelerator.num_processes
    if data.place[1] != processes:
        raise ValueError(f"the stream is dealt to {data.place[1]} processes, there are {processes}; leave out its rank")
    sets = data.sets if isinstance(data, SoftLabelMix) else (data,)
    for one in sets:
        assert isinstance(one, SoftLabelDataset), "batches of targets come from such data sets"
        if objective.temperature != 1 and (one.alpha > 0 or one.temperature != objective.temperature):
            problem = f"targets of temperature {one.temperature} and alpha {one.alpha}, the objective has temperature"
            raise ValueError(f"{one.uri}: {problem} {objective.temperature}; it needs targets of its own, and alpha 0")
        if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            tokenizer = wrap_tokenizer(trainer.processing_class, name="processing_class")
            print_of = one.metadata.tokenizer_fingerprint
            check_tokenizer(tokenizer, model="the Trainer", data=one.uri, data_fingerprint=print_of)


class _Stream(DataLoader[Any]):
    """Features of this rank's batches, epoch after epoch, to an end if there is one.

    After the last, copies of it without weight fill up its step.
    """

    dataset: ShardedBatches
    place: StreamState
    """State after the batch that was given last."""
    num_left: int | None = None
    """Batches to give before the end; None: without an end."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is what Trainer asks for
        batch = None
        while self.num_left is None or self.num_left > 0:
            for batch in super().__iter__():
                self.place = self.dataset.state_after(batch)
                yield batch.features()
                if self.num_left is not None:
                    self.num_left -= 1
                    if self.num_left == 0:
                        break
            self.dataset.load_state_dict(self.place)
        while batch is not None:
            yield batch.without_weight().features()

    def __len__(self) -> int:
        raise TypeError("what is left is counted in steps")


class _KeepPlace(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Writes beside each checkpoint how far the data has been trained on."""

    def __init__(self, trainer: SoftLabelTraining) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stream = self._trainer._stream
        if state.is_world_process_zero and stream is not None:
            saved = {
                "stream": stream.place,
                "digest": stream.dataset.digest,
                "first_epoch": self._trainer._first_epoch,
            }
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _PLACE).write_text(json.dumps(saved))
